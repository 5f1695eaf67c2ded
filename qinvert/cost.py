"""What a program costs, counted from its step list."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qinvert.accumulators import operand_magnitudes, partial_products
from qinvert.checks import check_power_of_two
from qinvert.errors import ProgramError
from qinvert.program import Program
from qinvert.steps import BETA, INPUT, Axis, MatMul, Rescale, Scale, Step

if TYPE_CHECKING:
    from qinvert.plan import LayerPlan


#: int8 multiply-accumulates in the time that one byte takes through memory.
BYTE_COST: Final = 10
#: The same for the overhead of one step, divided among 64 matrices.
NODE_COST: Final = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Work per input matrix."""

    #: Multiply-accumulates of all products, dense.
    macs: int
    #: Products; a stack of blocks counts once.
    matmuls: int
    #: Longest chain of products that wait for each other.
    depth: int
    #: Steps of any kind.
    steps: int
    #: Elements that all steps read and write; constants are not counted.
    elements: int
    #: The same in bytes of the format they are stored in.
    bytes: int

    @property
    def nodes(self) -> int:
        """Operations of a graph of the program: ``steps``, because constants are no steps.

        What a lowering wraps around them (quantize, cast, add) depends on the
        export profile and is not counted.
        """
        return self.steps

    def __str__(self) -> str:
        return (
            f"{self.macs:,} multiply-accumulates, {self.matmuls} products, depth {self.depth}, "
            f"{self.steps} steps, {self.elements:,} elements moved"
        )


def program_cost(program: Program, bytes_per_element: int = 1) -> Cost:
    """Return the cost of ``program`` for one matrix.

    Parameters
    ----------
    program : Program
    bytes_per_element : int
        Of every stored tensor: 1 for int8, 2 for int16 and 16-bit floats,
        4 for float32, 8 for float64.

    Raises
    ------
    ProgramError
        If ``bytes_per_element`` is no power of two up to 8.
    """
    check_power_of_two("bytes_per_element", bytes_per_element, 1, 8, ProgramError, "; int8 takes 1")
    elements = sum(_elements(program, step) for step in program.steps)
    return Cost(
        macs=sum(_macs(program, step) for step in program.steps),
        matmuls=sum(isinstance(step, MatMul) for step in program.steps),
        depth=_depth(program),
        steps=len(program.steps),
        elements=elements,
        bytes=bytes_per_element * elements,
    )


def _macs(program: Program, step: Step) -> int:
    if not isinstance(step, MatMul):
        return 0
    left, output = program.shapes[step.left], program.shapes[step.output]
    return output.blocks * output.rows * output.columns * left.columns


def _elements(program: Program, step: Step) -> int:
    total = 0
    for name in (*step.inputs, step.output):
        if name in program.shapes:
            blocks, rows, columns = program.shapes[name]
            total += blocks * rows * columns
    return total


def _depth(program: Program) -> int:
    depth = {INPUT: 0}
    for step in program.steps:
        before = max(depth.get(name, 0) for name in step.inputs)
        depth[step.output] = before + isinstance(step, MatMul)
    return depth[program.output]


def plan_cost(plan: LayerPlan) -> int:
    """Return the work of one matrix under a plan, in int8 multiply-accumulates.

    ``sum of partial products + BYTE_COST * bytes moved + NODE_COST * steps``:
    an int8x2 product counts as three int8 ones, an int16 one as four int8
    halves.  The weights are those of a CPU on a batch of 64; what counts are
    ratios between plans.
    """
    program, total = plan.program, 0
    for step in program.steps:
        total += NODE_COST + BYTE_COST * sum(
            math.prod(program.shapes[name]) * _bytes(plan, name)
            for name in (*step.inputs, step.output)
            if name in program.shapes
        )
        if isinstance(step, MatMul):
            total += _macs(program, step) * _products(plan, step)
    return total


def _bytes(plan: LayerPlan, name: str) -> int:
    fmt = plan.tensors[name].format
    return fmt.planes * fmt.container_bits // 8


def _products(plan: LayerPlan, step: MatMul) -> int:
    left, right = plan.tensors[step.left].format, plan.tensors[step.right].format
    pairs = partial_products(
        len(operand_magnitudes(left, right=False)), len(operand_magnitudes(right, right=True))
    )
    return sum(map(len, pairs)) * left.container_bits // 8


def step_formula(step: Step) -> str:
    """Return the right-hand side of a step, such as ``S @ Y + Y``."""
    if isinstance(step, MatMul):
        plus = "".join(f" + {name}" for name in step.add)
        minus = "".join(f" - {name}" for name in step.subtract)
        return f"{step.left} @ {step.right}{plus}{minus}"
    if isinstance(step, Scale):
        factor = f"diag({step.vector})"
        return f"{factor} @ {step.source}" if step.axis == Axis.ROWS else f"{step.source} @ {factor}"
    if isinstance(step, Rescale) and step.factor != 1:
        return f"rescale({step.factor:g} * {step.source})"
    return f"{type(step).__name__.lower()}({', '.join(step.inputs)})"


def step_table(program: Program) -> str:
    """Return the title, one line per step (shape, formula, cost), and the total."""
    rows = [("tensor", "shape", "multiply-accumulates", "formula")]
    for step in program.steps:
        macs = _macs(program, step)
        shape = str(program.shapes[step.output])
        rows.append((step.output, shape, f"{macs:,}" if macs else "-", _shorten(step_formula(step))))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [program.title]
    lines += [
        f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {macs:>{widths[2]}}  {formula}"
        for name, shape, macs, formula in rows
    ]
    return "\n".join([*lines, f"T = {_result(program)}: {program_cost(program)}"])


def _result(program: Program) -> str:
    if program.vectors:
        return f"I + diag({BETA}) @ {program.output}, {INPUT} stands for -L / {BETA}"
    return f"I + {program.output}" if program.implicit_identity else program.output


def _shorten(formula: str, limit: int = 72) -> str:
    return formula if len(formula) <= limit else f"{formula[: limit - 4]} ..."
