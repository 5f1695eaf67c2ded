"""Collects the steps of an inverse."""

from __future__ import annotations

from collections.abc import Mapping

from qinvert.program.builder import StepBuilder
from qinvert.program.ports import BETA, MATRIX, Meaning, inverse_inputs, inverse_output
from qinvert.program.program import Program


class Builder(StepBuilder):
    """Append-only list of steps and constants of one inverse.

    Parameters
    ----------
    chunk : int
        Size C of the matrices.
    factored : bool
        Whether the program takes beta as a separate input.
    """

    def __init__(self, chunk: int, factored: bool = False) -> None:
        super().__init__()
        self.chunk = chunk
        self.factored = factored
        #: Name of the input matrix: M, or K of a factored program.
        self.matrix = MATRIX
        #: Name of the input vector; only a factored program has it.
        self.beta = BETA

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
