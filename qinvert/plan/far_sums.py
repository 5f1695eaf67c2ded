"""Sums of a plan whose grids lie too far apart for kernels that fold zero points, and their cost."""

from __future__ import annotations

from collections.abc import Mapping

from qinvert.formats import INT8
from qinvert.numerics.folded_sums import loses
from qinvert.plan.quantization import Quantization
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.steps import Add, Rescale, Step


def is_far(step: Step, tensors: Mapping[str, Quantization]) -> bool:
    """Whether a step is a sum of 8-bit grids that folded zero points spoil.

    See `qinvert.numerics.folded_sums`.  A `Rescale` of factor 1 is the sum with
    a zero on the grid of its result.
    """
    match step:
        case Add():
            grids = [tensors[name] for name in (step.left, step.right, step.output)]
        case Rescale(factor=1):
            grids = [tensors[name] for name in (step.source, step.output, step.output)]
        case _:
            return False
    narrow = all(grid.format.container_bits == INT8.container_bits for grid in grids)
    return narrow and loses([grid.scale for grid in grids[:2]], grids[2].scale)


def far_sums_cost(plan: QuantizedProgram) -> int:
    """Multiply-accumulates of the products with an identity by which QDQ graphs write such sums."""
    shapes = [plan.program.shapes[step.output] for step in plan.program.steps if is_far(step, plan.tensors)]
    return sum(shape.blocks * shape.rows * shape.columns**2 for shape in shapes)
