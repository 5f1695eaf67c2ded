"""The same computation on transposed matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from qinvert.errors import ProgramError
from qinvert.program.assembly import rows_first
from qinvert.program.ports import Meaning, Port
from qinvert.program.program import Program
from qinvert.program.step_list import StepList
from qinvert.program.steps import Axis, Concat, Constant, MatMul, Range, Scale, Shape, Slice, Step

_OTHER: Final = {Axis.ROWS: Axis.COLUMNS, Axis.COLUMNS: Axis.ROWS, Axis.BLOCKS: Axis.BLOCKS}


def transposed(program: StepList) -> Program:
    """Return the program P' with ``P'(M^T) = P(M)^T``: every tensor holds the transposed one of ``program``.

    Parts of a matrix that is put together from blocks are others: rows come first, as everywhere.

    Products exchange their operands, so that each sum has the same terms in the
    same order.  A vector input stays as it is.  The ports are plain tensors,
    because a transposed M is not strictly lower triangular.

    Raises
    ------
    ProgramError
        If a constant is the right operand of a product, where it would become the left one, or has
        a column whose ones are not one range.
    """
    constants = {constant.name: _constant(constant) for constant in program.constants}
    found = Program(
        name=program.name,
        chunk=program.chunk,
        parameters=program.parameters,
        inputs=tuple(port if port.name in program.vector_inputs else _port(port) for port in program.inputs),
        outputs=tuple(map(_port, program.outputs)),
        constants=tuple(constants.values()),
        steps=tuple(_step(step, constants) for step in program.steps),
    )
    return replace(found, steps=rows_first(found))


def _port(port: Port) -> Port:
    blocks, rows, columns = port.shape
    return replace(port, shape=Shape(blocks, columns, rows), meaning=Meaning.TENSOR)


def _step(step: Step, constants: dict[str, Constant]) -> Step:
    match step:
        case MatMul():
            if step.right in constants:
                raise ProgramError(
                    f"step {step.output!r} multiplies by the constant {step.right!r}, which cannot be a left "
                    "operand; write the transposed program itself"
                )
            return replace(step, left=step.right, right=step.left)
        case Scale() | Concat():
            return replace(step, axis=_OTHER[step.axis])
        case Slice():
            return replace(step, rows=step.columns, columns=step.rows)
        case _:
            return step


def _constant(constant: Constant) -> Constant:
    ones = tuple(_column(constant, j) for j in range(constant.columns))
    return Constant(name=constant.name, rows=constant.columns, columns=constant.rows, ones=ones)


def _column(constant: Constant, j: int) -> Range:
    rows = [i for i, (start, stop) in enumerate(constant.ones) if start <= j < stop]
    if not rows:
        return 0, 0
    span = rows[0], rows[-1] + 1
    if span[1] - span[0] != len(rows):
        raise ProgramError(
            f"constant {constant.name!r} has a column whose ones are not one range; split the constant"
        )
    return span
