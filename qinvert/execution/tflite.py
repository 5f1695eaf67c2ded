"""Integer meaning of the steps in TFLite's reference kernels, for plans for which it is known."""

from __future__ import annotations

import torch

from qinvert.errors import PlanError
from qinvert.execution.integers import IntegerEvaluator
from qinvert.numerics import tflite
from qinvert.numerics.scales import product_scale
from qinvert.plan.integer_product import IntegerProduct
from qinvert.plan.quantization import Requantize
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.steps import Add, Exponential, MatMul, Rescale, Subtract


class TfliteEvaluator(IntegerEvaluator):
    """Integer meaning of the steps in TFLite, for plans that `check_plan` accepts."""

    def requantized(self, totals: list[torch.Tensor], product: IntegerProduct) -> torch.Tensor:
        (total,), output = totals, product.output
        unit = product_scale(product.left.scale, product.right.scale)
        rounded = tflite.requantize if isinstance(product.step, MatMul) else tflite.multiply
        return rounded(total, unit, output.scale, output.format)

    def multiplied(self, step: Rescale, source: torch.Tensor) -> torch.Tensor:
        output, sign = self.plan.tensors[step.output], 1 if step.factor > 0 else -1
        # Graphs multiply by an integer of 1 on a grid of the factor.
        unit = product_scale(self.plan.tensors[step.source].scale, abs(step.factor))
        return tflite.multiply(sign * source, unit, output.scale, output.format)

    def _sum(self, name: str, terms: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
        output = self.plan.tensors[name]
        # Graphs add a zero on the output's grid to a tensor that only changes its grid.
        zero = [(torch.zeros_like(terms[0][0]), output.scale)] if len(terms) == 1 else []
        return tflite.add([*terms, *zero], output.scale, output.format)


def check_plan(plan: QuantizedProgram) -> None:
    """Refuse a plan whose graphs TFLite does not run on int8 alone.

    Raises
    ------
    PlanError
        With the reason and the tensor.
    """
    remedy = "use rounding='onnx'"
    if plan.requantize is not Requantize.MULTIPLIER:
        raise PlanError(f"TFLite's integer kernels do not join the residual terms of this plan; {remedy}")
    for step in plan.program.steps:
        if isinstance(step, (Subtract, Exponential)):
            raise PlanError(f"how TFLite rounds step {step.output!r} is not known; {remedy}")
        grids = plan.grids_of(step)
        if isinstance(step, (Add, Rescale)) and not tflite.adds([grid.scale for grid in grids]):
            raise PlanError(f"TFLite does not sum on the grids of step {step.output!r}; {remedy}")
    for name, grid in plan.tensors.items():
        if grid.format.planes > 1 or grid.format.is_wide:
            raise PlanError(f"tensor {name!r} is {grid.format}, but only int8 is known in TFLite; {remedy}")
