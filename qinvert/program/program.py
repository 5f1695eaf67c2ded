"""The inverse as a flat list of typed steps over named tensors.

A `Program` is pure data.  It computes the strictly lower part ``S`` of

    T = (I - M)^-1 = I + S,        M = -L strictly lower triangular,

(or ``T`` itself where `Program.implicit_identity` is false; for the factored
form see `Program.vectors`).  Float execution,
observation, integer simulation, cost and ONNX lowering are all interpreters
of the same list: each implements `Evaluator` and is driven by
`Program.evaluate`.

The steps and the shapes of tensors are described in `qinvert.program.steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qinvert.errors import ProgramError
from qinvert.program.evaluator import Evaluator, V, apply_step
from qinvert.program.steps import INPUT, Constant, Shape, Step, check_chunk

if TYPE_CHECKING:
    import torch

    from qinvert.program.cost import Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Steps that compute ``T = (I - M)^-1`` from ``M``.

    Invariants, checked on construction: every name is defined once and before
    its use, shapes fit, and the output has the shape of the input.

    Raises
    ------
    ProgramError
        At construction, naming the step, what it was given and what fits.
    """

    #: Method name, such as ``block_merge``.
    name: str
    #: Size C of the input matrices, a power of two.
    chunk: int
    #: Arguments of the method, for display and provenance.
    parameters: Mapping[str, int | str] = field(default_factory=dict)
    #: 0/1 matrices that the steps use.
    constants: tuple[Constant, ...] = ()
    #: In execution order.
    steps: tuple[Step, ...] = ()
    #: Tensor that holds the result.
    output: str = INPUT
    #: The result is S = T - I: the identity is added after dequantization.
    implicit_identity: bool = True
    #: Vector inputs: none, or ``("beta",)``, which makes the program *factored*: it takes
    #: K = diag(beta)^-1 M for M and computes W = diag(beta)^-1 S.
    vectors: tuple[str, ...] = ()
    #: Shape of every tensor, derived.
    shapes: Mapping[str, Shape] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from qinvert.program.shapes import infer_shapes

        check_chunk(self.chunk)
        object.__setattr__(self, "shapes", infer_shapes(self))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the inputs and of every step's output, in order."""
        return (INPUT, *self.vectors, *(step.output for step in self.steps))

    def evaluate(
        self,
        evaluator: Evaluator[V],
        source: V,
        observe: Callable[[str, V], None] | None = None,
        vectors: Mapping[str, V] | None = None,
    ) -> V:
        """Run every step through ``evaluator`` and return the output's value.

        Parameters
        ----------
        evaluator : Evaluator
            Gives the steps their meaning.
        source : V
            Value of M (of K if the program is factored).
        observe : callable, optional
            Called as ``observe(name, value)`` for the inputs and after every
            step.  A value is dropped as soon as no later step needs it.
        vectors : mapping, optional
            Value of every vector input, ``[1, C, 1]`` per input matrix.

        Raises
        ------
        ProgramError
            If a vector input is missing, or the program takes none.
        """
        values: dict[str, V] = {INPUT: source, **(vectors or {})}
        if set(values) != {INPUT, *self.vectors}:
            raise ProgramError(
                f"{self.title} takes the vectors {list(self.vectors)}, got {list(vectors or {})}; "
                "pass one value for each"
            )
        if observe is not None:
            for name, value in values.items():
                observe(name, value)
        for step, dead in self._schedule():
            for constant in self.constants:
                if constant.name in step.inputs:
                    blocks = self.shapes[step.output].blocks
                    values[constant.name] = evaluator.constant(constant, blocks)
            value = apply_step(evaluator, step, values)
            values[step.output] = value
            if observe is not None:
                observe(step.output, value)
            for name in dead:
                values.pop(name, None)
        return values[self.output]

    def _schedule(self) -> Iterator[tuple[Step, list[str]]]:
        last = {name: i for i, step in enumerate(self.steps) for name in (*step.inputs, step.output)}
        last[self.output] = len(self.steps)
        for i, step in enumerate(self.steps):
            yield step, [name for name in (*step.inputs, step.output) if last[name] == i]

    def run(
        self,
        L: torch.Tensor,  # noqa: N803 - the field's name of this matrix
        dtype: torch.dtype | None = None,
        observe: Callable[[str, torch.Tensor], None] | None = None,
        beta: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``T = (I + L)^-1`` in floating point; see `qinvert.execution.floating.run`."""
        from qinvert.execution.floating import run

        return run(self, L, dtype=dtype, observe=observe, beta=beta)

    def cost(self, bytes_per_element: int = 1) -> Cost:
        """Work, depth and traffic of one matrix; see `qinvert.program.cost.program_cost`."""
        from qinvert.program.cost import program_cost

        return program_cost(self, bytes_per_element)

    def __str__(self) -> str:
        from qinvert.program.printing import step_table

        return step_table(self)

    @property
    def title(self) -> str:
        """One line, such as ``block_merge(chunk=64, base=4)``."""
        arguments = [f"chunk={self.chunk}", *(f"{k}={v}" for k, v in self.parameters.items())]
        return f"{self.name}({', '.join(arguments)})"
