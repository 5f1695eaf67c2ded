"""Integer meaning of the steps under one plan, on torch tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qinvert.execution.tensors import TorchEvaluator, along
from qinvert.numerics import rounding, scales
from qinvert.numerics.accumulators import integer_matmul, operand_magnitudes, partial_products, planes
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.steps import Add, MatMul, Rescale, Scale

#: Exact product of integer-valued tensors, dense or elementwise.
Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


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
        largest = max(
            *operand_magnitudes(tensors[step.left].format, right=False),
            *operand_magnitudes(tensors[step.right].format, right=True),
        )
        accumulators = self._accumulators(
            tensors[step.left],
            tensors[step.right],
            left,
            right,
            lambda a, b: integer_matmul(a, b, bound, largest),
        )
        signed = [
            *((name, 1, value) for name, value in zip(step.add, add, strict=True)),
            *((name, -1, value) for name, value in zip(step.subtract, subtract, strict=True)),
        ]
        output = tensors[step.output]
        if self.plan.requantize is Requantize.MULTIPLIER:
            totals = [total for total, _ in accumulators]
            for name, sign, value in signed:
                terms = self.plan.residual_planes(step, name, value, totals[0].dtype)
                for total, term in zip(totals, terms, strict=True):
                    total += sign * term
            return self.requantized(totals, self.plan.multiplier(step), output)
        (accumulator, unit), *addends = accumulators
        for name, sign, value in signed:
            addends += [(plane, sign * scale) for plane, scale in self._planes(name, value)]
        return rounding.requantize_divide(
            accumulator, unit, addends, output.scale, output.format, overwrite=True
        )

    def requantized(self, totals: list[torch.Tensor], factor: float, output: Quantization) -> torch.Tensor:
        """Return the integers of accumulators that are nobody else's, one or two planes of them."""
        return rounding.requantize_partial(totals, factor, output.scale, output.format, overwrite=True)

    def _planes(self, name: str, value: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
        grid = self.plan.tensors[name]
        return planes(value, grid.scale, grid.format)

    @staticmethod
    def _accumulators(
        left_grid: Quantization,
        right_grid: Quantization,
        left: torch.Tensor,
        right: torch.Tensor,
        multiply: Multiply,
    ) -> list[tuple[torch.Tensor, float]]:
        lefts = planes(left, left_grid.scale, left_grid.format)
        rights = rounding.operand_planes(right, right_grid.scale, right_grid.format)
        accumulators = []
        for pairs in partial_products(len(lefts), len(rights)):
            (i, j), *others = pairs
            total = multiply(lefts[i][0], rights[j][0])
            for k, m in others:
                total = total + multiply(lefts[k][0], rights[m][0])
            accumulators.append((total, scales.product_scale(lefts[i][1], rights[j][1])))
        return accumulators

    def add(self, step: Add, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self._sum(step.output, [*self._planes(step.left, left), *self._planes(step.right, right)])

    def rescale(self, step: Rescale, source: torch.Tensor) -> torch.Tensor:
        if step.factor == 1:
            return self._sum(step.output, self._planes(step.source, source))
        grid, output = self.plan.tensors[step.source], self.plan.tensors[step.output]
        value = rounding.dequantize(source, grid.scale, grid.format)
        return rounding.requantize_scaled(value, 1.0, step.factor, output.scale, output.format)

    def scale(self, step: Scale, source: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        tensors, output = self.plan.tensors, self.plan.tensors[step.output]
        # One product an element, at most 2^22: exact in float32.
        terms = self._accumulators(
            tensors[step.source], tensors[step.vector], source, along(step, vector), torch.mul
        )
        if self.plan.requantize is Requantize.MULTIPLIER:
            totals = [total for total, _ in terms]
            return rounding.requantize_partial(
                totals, self.plan.multiplier(step), output.scale, output.format
            )
        return self._sum(step.output, terms)

    def _sum(self, name: str, terms: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
        (first, unit), *addends = terms
        output = self.plan.tensors[name]
        return rounding.requantize_divide(first, unit, addends, output.scale, output.format)
