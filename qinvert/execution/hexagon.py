"""Integer meaning of the steps on Qualcomm's Hexagon, for plans for which it is known."""

from __future__ import annotations

import torch

from qinvert.errors import PlanError
from qinvert.execution.integers import IntegerEvaluator
from qinvert.numerics import hexagon
from qinvert.numerics.scales import is_power_of_two
from qinvert.plan.integer_product import IntegerProduct
from qinvert.plan.quantization import Requantize
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.steps import Add, Concat, Mask, MatMul, Rescale, Slice


class HexagonEvaluator(IntegerEvaluator):
    """Integer meaning of the steps on Hexagon, for plans that `check_plan` accepts."""

    def requantized(self, totals: list[torch.Tensor], product: IntegerProduct) -> torch.Tensor:
        (total,) = totals
        return hexagon.requantize(total, product.factor, product.output.format)

    def _sum(self, name: str, terms: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
        output = self.plan.tensors[name]
        return hexagon.add(terms, output.scale, output.format)


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
    for step in plan.program.steps:
        grids = plan.grids_of(step)
        kept = isinstance(step, Rescale) and plan.keeps_integers(step)
        sums = isinstance(step, Add) and _is_known_sum({grid.scale for grid in grids})
        if not kept and not sums and not isinstance(step, (MatMul, Slice, Concat, Mask)):
            raise PlanError(f"how Hexagon rounds step {step.output!r} is not known; {remedy}")
    for name, grid in plan.tensors.items():
        if grid.format.planes > 1 or grid.format.is_wide:
            raise PlanError(f"tensor {name!r} is {grid.format}, but only int8 is known on Hexagon; {remedy}")
        if not hexagon.SCALES[0] <= grid.scale <= hexagon.SCALES[1]:
            raise PlanError(f"the scale of tensor {name!r}, {grid.scale:g}, is beyond float16; {remedy}")


def _is_known_sum(scales: set[float]) -> bool:
    """Whether a sum of grids with these scales is known: on one grid it is a sum of integers."""
    return len(scales) == 1 or all(map(is_power_of_two, scales))
