"""What a program costs, counted from its step list."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qinvert.checks import check_power_of_two
from qinvert.errors import ProgramError
from qinvert.program.step_list import StepList
from qinvert.program.steps import MatMul, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Work per input matrix."""

    #: Multiply-accumulates of all products, as if operands were dense.
    macs: int
    #: Number of products; a stack of blocks counts once.
    matmuls: int
    #: Longest chain of products that wait for each other.
    depth: int
    #: Number of steps of any kind.
    steps: int
    #: Number of elements that all steps read and write; constants are not counted.
    elements: int
    #: The same in bytes of the format in which they are stored.
    bytes: int

    @property
    def nodes(self) -> int:
        """Operations of a graph of the program: ``steps``, because constants are not steps.

        What a lowering wraps around them (quantize, cast, add) depends on the
        export profile and is not counted.
        """
        return self.steps

    def __str__(self) -> str:
        return (
            f"{self.macs:,} multiply-accumulates, {self.matmuls} products, depth {self.depth}, "
            f"{self.steps} steps, {self.elements:,} elements moved"
        )


def program_cost(program: StepList, bytes_per_element: int = 1) -> Cost:
    """Return the cost of ``program`` for one matrix.

    Parameters
    ----------
    program : StepList
    bytes_per_element : int
        Width of every stored tensor: 1 for int8, 2 for int16 and 16-bit floats,
        4 for float32, 8 for float64.

    Raises
    ------
    ProgramError
        If ``bytes_per_element`` is not a power of two up to 8.
    """
    check_power_of_two("bytes_per_element", bytes_per_element, 1, 8, ProgramError, "; int8 takes 1")
    elements = sum(_elements(program, step) for step in program.steps)
    return Cost(
        macs=sum(multiply_accumulates(program, step) for step in program.steps),
        matmuls=sum(isinstance(step, MatMul) for step in program.steps),
        depth=_depth(program),
        steps=len(program.steps),
        elements=elements,
        bytes=bytes_per_element * elements,
    )


def multiply_accumulates(program: StepList, step: Step) -> int:
    """Return the multiply-accumulates of one step for one matrix, which are 0 for all steps but products."""
    if not isinstance(step, MatMul):
        return 0
    return math.prod(program.shapes[step.output]) * inner_size(program, step)


def inner_size(program: StepList, step: Step) -> int:
    """Return the number of products in one element's sum; 1 for steps that do not sum products."""
    return program.shapes[step.left].columns if isinstance(step, MatMul) else 1


def _elements(program: StepList, step: Step) -> int:
    total = 0
    for name in (*step.inputs, step.output):
        if name in program.shapes:
            blocks, rows, columns = program.shapes[name]
            total += blocks * rows * columns
    return total


def _depth(program: StepList) -> int:
    depth = {port.name: 0 for port in program.inputs}
    for step in program.steps:
        before = max(depth.get(name, 0) for name in step.inputs)
        depth[step.output] = before + isinstance(step, MatMul)
    return max(depth[port.tensor] for port in program.outputs)
