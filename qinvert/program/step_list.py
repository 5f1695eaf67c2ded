"""The data of a program: typed steps between named ports, and how an interpreter is driven through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qinvert.errors import ProgramError
from qinvert.program.evaluator import Evaluator, V, apply_step
from qinvert.program.ports import InversePorts, Port, find_inverse_ports
from qinvert.program.shapes import check_outputs, check_partial, infer_shapes, vector_inputs
from qinvert.program.steps import Constant, Shape, Step, check_chunk, partial_outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class StepList:
    """Steps that compute the output ports from the input ports; `qinvert.Program` adds ways to run it.

    Invariants, checked on construction: every name is defined once and before
    its use, shapes fit, and every output has the shape of its port and is not partial.

    Raises
    ------
    ProgramError
        At construction, naming the step or port, what it was given and what fits.
    """

    #: Name of the method, such as ``block_merge``.
    name: str
    #: Size C of a chunk, a power of two.
    chunk: int
    #: What the program takes, in order.
    inputs: tuple[Port, ...]
    #: What the program returns, in order.
    outputs: tuple[Port, ...]
    #: Arguments of the method, for display and provenance.
    parameters: Mapping[str, int | str] = field(default_factory=dict)
    #: 0/1 matrices that the steps use.
    constants: tuple[Constant, ...] = ()
    #: In execution order.
    steps: tuple[Step, ...] = ()
    #: Shape of every tensor.  It is derived.
    shapes: Mapping[str, Shape] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_chunk(self.chunk)
        shapes = infer_shapes(self.name, self.inputs, self.constants, self.steps)
        check_outputs(self.name, self.outputs, shapes, self.vector_inputs)
        check_partial(self.name, self.outputs, self.partial_tensors)
        object.__setattr__(self, "shapes", shapes)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the inputs and of every step's output, in order."""
        return (*(port.name for port in self.inputs), *(step.output for step in self.steps))

    @property
    def vector_inputs(self) -> set[str]:
        """Inputs by which scales multiply and which nothing else reads, including beta."""
        return vector_inputs(self.inputs, self.steps)

    @property
    def partial_tensors(self) -> set[str]:
        """Outputs of partial steps: their values may saturate beyond the range of what reads them."""
        return partial_outputs(self.steps)

    @property
    def is_inverse(self) -> bool:
        """Whether the ports are those of a triangular inverse."""
        return find_inverse_ports(self.inputs, self.outputs, self.chunk) is not None

    @property
    def inverse_ports(self) -> InversePorts:
        """The tensors of M, beta and the result of a program that computes an inverse.

        Raises
        ------
        ProgramError
            If the program has other ports.
        """
        found = find_inverse_ports(self.inputs, self.outputs, self.chunk)
        if found is None:
            raise ProgramError(
                f"{self.title} is not an inverse: it maps {_listed(self.inputs)} to {_listed(self.outputs)}; "
                "pass its inputs by name, or a program that maps M to S"
            )
        return found

    def evaluate(
        self,
        evaluator: Evaluator[V],
        inputs: Mapping[str, V],
        observe: Callable[[str, V], None] | None = None,
    ) -> dict[str, V]:
        """Run every step through ``evaluator`` and return the value of every output port by its name.

        Parameters
        ----------
        evaluator : Evaluator
            Gives the steps their meaning.
        inputs : mapping
            Value of every input port, by its name.
        observe : callable, optional
            Called as ``observe(name, value)`` for the inputs and after every
            step.  A value is dropped as soon as no later step needs it.

        Raises
        ------
        ProgramError
            If an input is missing, or is not an input of the program.
        """
        names = [port.name for port in self.inputs]
        if set(inputs) != set(names):
            raise ProgramError(
                f"{self.title} takes the inputs {', '.join(names)}, got {', '.join(inputs) or 'none'}; "
                "pass one value for each"
            )
        values = {name: inputs[name] for name in names}
        if observe is not None:
            for name, value in values.items():
                observe(name, value)
        self.follow(evaluator, self.steps, values, [port.tensor for port in self.outputs], observe)
        return {port.name: values[port.tensor] for port in self.outputs}

    def follow(
        self,
        evaluator: Evaluator[V],
        steps: Sequence[Step],
        values: dict[str, V],
        wanted: Iterable[str],
        observe: Callable[[str, V], None] | None = None,
    ) -> None:
        """Run some of the steps on ``values``, which gains their outputs; what nothing needs any more goes.

        Parameters
        ----------
        evaluator, observe
            See `evaluate`.
        steps : sequence of Step
            Steps of the program, in its order.
        values : dict
            Value of everything that they read.
        wanted : iterable of str
            Tensors that stay.
        """
        for step, dead in _schedule(steps, wanted):
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

    def depends_on(self, *ports: str) -> set[str]:
        """Return the tensors that depend on one of these input ports, themselves included."""
        found = set(ports)
        for step in self.steps:
            if found.intersection(step.inputs):
                found.add(step.output)
        return found

    @property
    def title(self) -> str:
        """One line, such as ``block_merge(chunk=64, base=4)``."""
        arguments = [f"chunk={self.chunk}", *(f"{k}={v}" for k, v in self.parameters.items())]
        return f"{self.name}({', '.join(arguments)})"


def _schedule(steps: Sequence[Step], wanted: Iterable[str]) -> Iterator[tuple[Step, list[str]]]:
    """Yield every step with the tensors that no later step reads."""
    last = {name: i for i, step in enumerate(steps) for name in (*step.inputs, step.output)}
    last |= dict.fromkeys(wanted, len(steps))
    for i, step in enumerate(steps):
        yield step, [name for name in (*step.inputs, step.output) if last[name] == i]


def _listed(ports: tuple[Port, ...]) -> str:
    return ", ".join(map(str, ports)) or "nothing"
