"""Integer meaning of the steps on Qualcomm's Hexagon, for plans for which it is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qinvert.errors import PlanError
from qinvert.execution.integers import IntegerEvaluator
from qinvert.formats import IntFormat
from qinvert.numerics import hexagon, rounding
from qinvert.numerics.exact import integer_matmul
from qinvert.numerics.scales import is_power_of_two
from qinvert.plan.integer_product import IntegerProduct
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.steps import Add, Concat, Mask, MatMul, Rescale, Slice, Step


class HexagonEvaluator(IntegerEvaluator):
    """Integer meaning of the steps on Hexagon, for plans that `check_plan` accepts."""

    def matmul(
        self,
        step: MatMul,
        left: torch.Tensor,
        right: torch.Tensor,
        add: list[torch.Tensor],
        subtract: list[torch.Tensor],
    ) -> torch.Tensor:
        product = self.plan.products[step.output]
        if not product.left.format.is_wide:
            return super().matmul(step, left, right, add, subtract)
        fmt = product.right.format
        read = hexagon.clamped(right, fmt)
        total = integer_matmul(left, read, product.bound, product.magnitude)
        accumulator = hexagon.cut(total, read.to(torch.float64).sum(-2, keepdim=True), fmt)
        factor = product.factor * 2.0 ** hexagon.cut_bits(fmt)
        return hexagon.requantize(accumulator, factor, product.output.format)

    def requantized(self, totals: list[torch.Tensor], product: IntegerProduct) -> torch.Tensor:
        (total,) = totals
        return hexagon.requantize(total, product.factor, product.output.format)

    def _sum(self, name: str, terms: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
        output = self.plan.tensors[name]
        return hexagon.add(terms, output.scale, output.format)


def quantize(x: torch.Tensor, scale: float, fmt: IntFormat) -> torch.Tensor:
    """Put floats on a grid: Hexagon itself does so in 8 bits, and the host, as ONNX says, in 16."""
    law = rounding.quantize if fmt.is_wide else hexagon.quantize
    return law(x, scale, fmt)


def needs_integer_ends(plan: QuantizedProgram) -> bool:
    """Whether the law is only known where integers go in and out: as floats, 16 bits become a float16."""
    return any(grid.format.is_wide for grid in plan.tensors.values())


def check_plan(plan: QuantizedProgram) -> None:
    """Refuse a plan with operators whose rounding on Hexagon is not known.

    Raises
    ------
    PlanError
        With the tensor or step.
    """
    remedy = "use rounding='onnx'"
    if plan.requantize is not Requantize.MULTIPLIER:
        raise PlanError(f"Hexagon joins the residual terms of this plan in float16; {remedy}")
    for name, grid in plan.tensors.items():
        if grid.format.planes > 1 or grid.format.is_split or grid.format.is_float:
            raise PlanError(
                f"tensor {name!r} is {grid.format}, but Hexagon's int8 and int16-whole are known; {remedy}"
            )
    for step in plan.program.steps:
        if not _is_known_step(plan, step):
            raise PlanError(f"how Hexagon rounds step {step.output!r} is not known; {remedy}")
    for name, grid in plan.tensors.items():
        if not grid.format.is_wide and not hexagon.SCALES[0] <= grid.scale <= hexagon.SCALES[1]:
            raise PlanError(f"the scale of tensor {name!r}, {grid.scale:g}, is beyond float16; {remedy}")


def _is_known_step(plan: QuantizedProgram, step: Step) -> bool:
    match step:
        case MatMul():
            return _is_known_product(plan.products[step.output])
        case Rescale():
            return plan.keeps_integers(step)
        case Add():
            return _is_known_sum(plan.grids_of(step))
        case _:
            return isinstance(step, (Slice, Concat, Mask))


def _is_known_product(product: IntegerProduct) -> bool:
    """Whether the law knows a product: other mixtures of widths run in float on Hexagon."""
    left, right, output = (q.format.is_wide for q in (product.left, product.right, product.output))
    if not (left or right or output):
        return True
    # How a graph lets residual terms join decides the sums of columns.
    return left and output and not any(part.residuals for part in product.accumulators)


def _is_known_sum(grids: Sequence[Quantization]) -> bool:
    """Whether a sum on these grids is known: on one grid it is a sum of integers."""
    scales = {grid.scale for grid in grids}
    wide = any(grid.format.is_wide for grid in grids)
    return len(scales) == 1 or (not wide and all(map(is_power_of_two, scales)))
