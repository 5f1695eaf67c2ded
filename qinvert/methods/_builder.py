"""Collects the steps of a program; each call appends one and returns its name."""

from __future__ import annotations

from collections.abc import Mapping

from qinvert.program.ports import BETA, MATRIX, Meaning, inverse_inputs, inverse_output
from qinvert.program.program import Program
from qinvert.program.steps import (
    Add,
    Axis,
    Concat,
    Constant,
    Mask,
    MatMul,
    Range,
    Rescale,
    Scale,
    Slice,
    Step,
)


class Builder:
    """Append-only list of steps and constants of one program.

    Parameters
    ----------
    chunk : int
        Size C of the matrices.
    factored : bool
        Whether the program takes beta as a separate input.
    """

    def __init__(self, chunk: int, factored: bool = False) -> None:
        self.chunk = chunk
        self.factored = factored
        #: Name of the input matrix: M, or K of a factored program.
        self.matrix = MATRIX
        #: Name of the input vector; only a factored program has it.
        self.beta = BETA
        self.steps: list[Step] = []
        self.constants: dict[str, Constant] = {}

    def matmul(
        self,
        output: str,
        left: str,
        right: str,
        *,
        add: tuple[str, ...] = (),
        subtract: tuple[str, ...] = (),
        bound: float | None = None,
        partial: bool = False,
    ) -> str:
        step = MatMul(
            output=output,
            left=left,
            right=right,
            add=add,
            subtract=subtract,
            bound=bound,
            partial=partial,
        )
        return self._append(step)

    def add(self, output: str, left: str, right: str, bound: float | None = None) -> str:
        return self._append(Add(output=output, left=left, right=right, bound=bound))

    def rescale(self, output: str, source: str, factor: float = 1.0, bound: float | None = None) -> str:
        return self._append(Rescale(output=output, source=source, factor=factor, bound=bound))

    def scale(self, output: str, source: str, vector: str, axis: Axis, bound: float | None = None) -> str:
        return self._append(Scale(output=output, source=source, vector=vector, axis=axis, bound=bound))

    def mask(self, output: str, source: str, constant: Constant, bound: float | None = None) -> str:
        self.constants[constant.name] = constant
        return self._append(Mask(output=output, source=source, constant=constant.name, bound=bound))

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
        names = []
        for source in sources:
            if isinstance(source, Constant):
                self.constants[source.name] = source
            names.append(source.name if isinstance(source, Constant) else source)
        return self._append(Concat(output=output, sources=tuple(names), axis=axis, bound=bound))

    def program(self, name: str, parameters: Mapping[str, int | str], output: str) -> Program:
        form = Meaning.FACTORED_INVERSE if self.factored else Meaning.STRICT_INVERSE
        return Program(
            name=name,
            chunk=self.chunk,
            parameters=dict(parameters),
            constants=tuple(self.constants.values()),
            steps=tuple(self.steps),
            inputs=inverse_inputs(self.chunk, self.factored),
            outputs=(inverse_output(self.chunk, output, form),),
        )

    def _append(self, step: Step) -> str:
        self.steps.append(step)
        return step.output
