"""Sums and elementwise products of grids too far apart for kernels that fold zero points, and their cost."""

from __future__ import annotations

from collections.abc import Mapping

from qinvert.formats import INT8
from qinvert.numerics.folded_products import leaves_int32
from qinvert.numerics.folded_sums import loses
from qinvert.plan.integer_product import operands
from qinvert.plan.quantization import Quantization, constant_grid
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.steps import Add, Multiply, Rescale, Scale, Step, Subtract


def is_far(step: Step, tensors: Mapping[str, Quantization]) -> bool:
    """Whether a step is a sum or an elementwise product of 8-bit grids that such kernels spoil.

    See `qinvert.numerics.folded_sums` and `qinvert.numerics.folded_products`.
    A `Rescale` is the sum with a zero on the grid of its result if its factor
    is 1, and else the product with 1 on the grid of that factor.
    """
    names: tuple[str, ...]
    spoils, factor = loses, 1.0
    match step:
        case Add() | Subtract():
            names = (step.left, step.right, step.output)
        case Rescale(factor=1):
            names = (step.source, step.output, step.output)
        case Rescale():
            names = (step.source, step.output)
            spoils, factor = leaves_int32, abs(step.factor)
        case Scale() | Multiply():
            names = (*operands(step), step.output)
            spoils = leaves_int32
        case _:
            return False
    # A constant may stand on the right of a sum.
    own = constant_grid(tensors[names[0]])
    *grids, result = [tensors.get(name, own) for name in names]
    narrow = all(grid.format.container_bits == INT8.container_bits for grid in (*grids, result))
    return narrow and spoils([grid.scale * factor for grid in grids], result.scale)


def far_sums_cost(plan: QuantizedProgram) -> int:
    """Multiply-accumulates of the products with an identity by which QDQ graphs write such steps."""
    shapes = [plan.program.shapes[step.output] for step in plan.program.steps if is_far(step, plan.tensors)]
    return sum(shape.blocks * shape.rows * shape.columns**2 for shape in shapes)
