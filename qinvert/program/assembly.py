"""Matrices that are put together from blocks: rows of blocks first, then columns."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from qinvert.program.step_list import StepList
from qinvert.program.steps import Axis, Concat, Step


def rows_first(program: StepList) -> tuple[Step, ...]:
    """Return the steps with ``[A B; C D]`` as ``[[A; C] [B; D]]``, because a compiler for NPUs gets
    the other order wrong.

    A Concat of rows changes if all that it joins is a Concat of columns that nobody
    else reads, cut alike.  The new blocks take the names and places of the old ones.
    """
    readers = Counter(name for step in program.steps for name in {*step.inputs})
    readers.update(port.tensor for port in program.outputs)
    joins = {step.output: step for step in program.steps if isinstance(step, Concat)}
    steps: list[Step] = []
    for step in program.steps:
        columns = _columns(program, step, joins, readers)
        if isinstance(step, Concat) and columns:
            steps = [old for old in steps if old.output not in step.sources]
            steps += columns
            step = replace(step, sources=tuple(column.output for column in columns), axis=Axis.COLUMNS)
        steps.append(step)
    return tuple(steps)


def _columns(program: StepList, step: Step, joins: dict[str, Concat], readers: Counter[str]) -> list[Concat]:
    """The columns of blocks that a Concat of rows consists of; none if it is another step."""
    if not isinstance(step, Concat) or step.axis != Axis.ROWS:
        return []
    rows = [joins[name] for name in step.sources if name in joins and readers[name] == 1]
    same = len(rows) == len(step.sources) and all(row.axis == Axis.COLUMNS for row in rows)
    if not same or len({_widths(program, row) for row in rows}) != 1:
        return []
    parts = list(zip(*(row.sources for row in rows), strict=True))
    # A column of nothing but zeros has no tensor to join.
    if any(not set(part) & program.shapes.keys() for part in parts):
        return []
    names = [row.output for row in rows] if len(rows) == len(parts) else _names(step.output, len(parts))
    return [
        Concat(output=name, sources=part, axis=Axis.ROWS, bound=step.bound)
        for name, part in zip(names, parts, strict=True)
    ]


def _widths(program: StepList, row: Concat) -> tuple[int, ...]:
    constants = {constant.name: constant.columns for constant in program.constants}
    return tuple(
        program.shapes[name].columns if name in program.shapes else constants[name] for name in row.sources
    )


def _names(output: str, count: int) -> list[str]:
    return [f"{output}/column_{i}" for i in range(count)]
