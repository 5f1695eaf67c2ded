"""Runs a `LayerPlan` in exact integer arithmetic.

Values are integer-valued float32 tensors (see `qinvert.arithmetic`), so the
same code runs batched on a CPU or a CUDA device and gives the same bits on
both: products and accumulators are exact integers whatever the kernel, and
the few float32 operations around them are IEEE operations, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qinvert import arithmetic
from qinvert.execute import TorchEvaluator, add_identity
from qinvert.plan import LayerPlan, Requantize
from qinvert.steps import Add, MatMul, Rescale

Observer = Callable[[str, torch.Tensor], None]


class IntegerEvaluator(TorchEvaluator):
    """Integer meaning of the steps under one plan."""

    def __init__(self, plan: LayerPlan, batch: int, device: torch.device) -> None:
        super().__init__(batch, torch.float32, device)
        self.plan = plan

    def matmul(
        self,
        step: MatMul,
        left: torch.Tensor,
        right: torch.Tensor,
        add: list[torch.Tensor],
        subtract: list[torch.Tensor],
    ) -> torch.Tensor:
        magnitude = max(self.plan.tensors[name].format.magnitude for name in (step.left, step.right))
        accumulator = arithmetic.integer_matmul(left, right, self.plan.accumulator_bound(step), magnitude)
        signed = [
            *((name, 1, value) for name, value in zip(step.add, add, strict=True)),
            *((name, -1, value) for name, value in zip(step.subtract, subtract, strict=True)),
        ]
        tensors = self.plan.tensors
        output = tensors[step.output]
        if self.plan.requantize is Requantize.MULTIPLIER:
            for name, sign, value in signed:
                # In the accumulator's dtype: the product may exceed what float32 holds exactly.
                term = value.to(accumulator.dtype)
                accumulator = accumulator + term * (sign * self.plan.residual_factor(step, name))
            return arithmetic.requantize_multiplier(accumulator, self.plan.multiplier(step), output.format)
        addends = [(value, sign * tensors[name].scale) for name, sign, value in signed]
        unit = arithmetic.product_scale(tensors[step.left].scale, tensors[step.right].scale)
        return arithmetic.requantize_divide(accumulator, unit, addends, output.scale, output.format)

    def add(self, step: Add, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        tensors = self.plan.tensors
        output = tensors[step.output]
        return arithmetic.requantize_divide(
            left, tensors[step.left].scale, [(right, tensors[step.right].scale)], output.scale, output.format
        )

    def rescale(self, step: Rescale, source: torch.Tensor) -> torch.Tensor:
        output = self.plan.tensors[step.output]
        unit = self.plan.tensors[step.source].scale
        return arithmetic.requantize_scaled(source, unit, step.factor, output.scale, output.format)


def simulate_inverse(plan: LayerPlan, lower: torch.Tensor, observe: Observer | None = None) -> torch.Tensor:
    """`LayerPlan.inverse` of a checked tensor ``L``; float32 on its device.

    Raises
    ------
    InputError
        If ``lower`` holds a NaN.
    """
    result = simulate_integers(plan, lower, observe)
    values = arithmetic.dequantize(result, plan.output.scale, plan.output.format)
    return add_identity(plan.program, values)


def simulate_integers(plan: LayerPlan, lower: torch.Tensor, observe: Observer | None = None) -> torch.Tensor:
    """Integers of the program's output for a checked ``L``, as integer-valued float32.

    ``observe(name, integers)`` receives M and every step's output.
    """
    flat = lower.reshape(-1, plan.chunk, plan.chunk)
    evaluator = IntegerEvaluator(plan, flat.shape[0], flat.device)
    source = arithmetic.quantize(-flat.to(torch.float32), plan.input.scale, plan.input.format)
    # Autocast would run the products of the float32 integers in 16-bit accumulators.
    with torch.autocast(flat.device.type, enabled=False):
        return plan.program.evaluate(evaluator, source, observe).reshape(lower.shape)
