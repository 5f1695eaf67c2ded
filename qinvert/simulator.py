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
from qinvert.plan import LayerPlan, Quantization, Requantize
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
        tensors, bound = self.plan.tensors, self.plan.accumulator_bound(step)
        accumulators = self._accumulators(tensors[step.left], tensors[step.right], left, right, bound)
        signed = [
            *((name, 1, value) for name, value in zip(step.add, add, strict=True)),
            *((name, -1, value) for name, value in zip(step.subtract, subtract, strict=True)),
        ]
        output = tensors[step.output]
        (accumulator, unit), *addends = accumulators
        if self.plan.requantize is Requantize.MULTIPLIER:
            for name, sign, value in signed:
                # In the accumulator's dtype: the product may exceed what float32 holds exactly.
                term = value.to(accumulator.dtype)
                accumulator = accumulator + term * (sign * self.plan.residual_factor(step, name))
            return arithmetic.requantize_multiplier(accumulator, self.plan.multiplier(step), output.format)
        for name, sign, value in signed:
            addends += [(plane, sign * scale) for plane, scale in self._planes(name, value)]
        return arithmetic.requantize_divide(accumulator, unit, addends, output.scale, output.format)

    def _planes(self, name: str, value: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
        grid = self.plan.tensors[name]
        return arithmetic.planes(value, grid.scale, grid.format)

    @staticmethod
    def _accumulators(
        left_grid: Quantization,
        right_grid: Quantization,
        left: torch.Tensor,
        right: torch.Tensor,
        bound: int,
    ) -> list[tuple[torch.Tensor, float]]:
        lefts = arithmetic.planes(left, left_grid.scale, left_grid.format)
        rights = arithmetic.operand_planes(right, right_grid.scale, right_grid.format)
        largest = max(
            *arithmetic.operand_magnitudes(left_grid.format, right=False),
            *arithmetic.operand_magnitudes(right_grid.format, right=True),
        )
        accumulators = []
        for pairs in arithmetic.partial_products(len(lefts), len(rights)):
            (i, j), *others = pairs
            total = arithmetic.integer_matmul(lefts[i][0], rights[j][0], bound, largest)
            for k, m in others:
                total = total + arithmetic.integer_matmul(lefts[k][0], rights[m][0], bound, largest)
            accumulators.append((total, arithmetic.product_scale(lefts[i][1], rights[j][1])))
        return accumulators

    def add(self, step: Add, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self._sum(step.output, [*self._planes(step.left, left), *self._planes(step.right, right)])

    def rescale(self, step: Rescale, source: torch.Tensor) -> torch.Tensor:
        if step.factor == 1:
            return self._sum(step.output, self._planes(step.source, source))
        grid, output = self.plan.tensors[step.source], self.plan.tensors[step.output]
        value = arithmetic.dequantize(source, grid.scale, grid.format)
        return arithmetic.requantize_scaled(value, 1.0, step.factor, output.scale, output.format)

    def _sum(self, name: str, terms: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
        (first, unit), *addends = terms
        output = self.plan.tensors[name]
        return arithmetic.requantize_divide(first, unit, addends, output.scale, output.format)


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
