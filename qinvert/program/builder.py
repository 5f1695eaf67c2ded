"""Collects the steps of a program; each call appends one and returns its name."""

from __future__ import annotations

from collections.abc import Mapping

from qinvert.program.inlining import inlined
from qinvert.program.step_list import StepList
from qinvert.program.steps import (
    Add,
    Axis,
    Concat,
    Constant,
    Exponential,
    Mask,
    MatMul,
    Multiply,
    Range,
    Rescale,
    Scale,
    Slice,
    Step,
    Subtract,
    Transpose,
)


class StepBuilder:
    """Append-only list of steps and constants of one program."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.constants: dict[str, Constant] = {}

    def matmul(
        self,
        output: str,
        left: str,
        right: str | Constant,
        *,
        add: tuple[str, ...] = (),
        subtract: tuple[str, ...] = (),
        bound: float | None = None,
        partial: bool = False,
    ) -> str:
        step = MatMul(
            output=output,
            left=left,
            right=self._named(right),
            add=add,
            subtract=subtract,
            bound=bound,
            partial=partial,
        )
        return self._append(step)

    def add(self, output: str, left: str, right: str | Constant, bound: float | None = None) -> str:
        return self._append(Add(output=output, left=left, right=self._named(right), bound=bound))

    def subtract(self, output: str, left: str, right: str | Constant, bound: float | None = None) -> str:
        return self._append(Subtract(output=output, left=left, right=self._named(right), bound=bound))

    def multiply(self, output: str, left: str, right: str, bound: float | None = None) -> str:
        return self._append(Multiply(output=output, left=left, right=right, bound=bound))

    def exponential(self, output: str, source: str, bound: float | None = 1.0) -> str:
        return self._append(Exponential(output=output, source=source, bound=bound))

    def rescale(self, output: str, source: str, factor: float = 1.0, bound: float | None = None) -> str:
        return self._append(Rescale(output=output, source=source, factor=factor, bound=bound))

    def scale(self, output: str, source: str, vector: str, axis: Axis, bound: float | None = None) -> str:
        return self._append(Scale(output=output, source=source, vector=vector, axis=axis, bound=bound))

    def mask(self, output: str, source: str, constant: Constant, bound: float | None = None) -> str:
        return self._append(Mask(output=output, source=source, constant=self._named(constant), bound=bound))

    def transpose(self, output: str, source: str, bound: float | None = None) -> str:
        return self._append(Transpose(output=output, source=source, bound=bound))

    def slice(
        self,
        output: str,
        source: str,
        *,
        blocks: Range | None = None,
        rows: Range | None = None,
        columns: Range | None = None,
        bound: float | None = None,
    ) -> str:
        return self._append(
            Slice(output=output, source=source, blocks=blocks, rows=rows, columns=columns, bound=bound)
        )

    def concat(
        self, output: str, sources: list[str | Constant], axis: Axis, bound: float | None = None
    ) -> str:
        names = tuple(map(self._named, sources))
        return self._append(Concat(output=output, sources=names, axis=axis, bound=bound))

    def inline(
        self,
        program: StepList,
        inputs: Mapping[str, str],
        prefix: str,
        copies: int = 1,
        max_beta: float = 1.0,
    ) -> dict[str, str]:
        """Append all steps of a program; return the tensor of every output port by its name.

        See `qinvert.program.inlining.inlined` for the parameters.
        """
        steps, constants, outputs = inlined(program, inputs, prefix, copies, max_beta)
        for constant in constants:
            self._named(constant)
        self.steps += steps
        return outputs

    def _named(self, source: str | Constant) -> str:
        if not isinstance(source, Constant):
            return source
        self.constants[source.name] = source
        return source.name

    def _append(self, step: Step) -> str:
        self.steps.append(step)
        return step.output
