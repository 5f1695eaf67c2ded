"""Integer meaning of the steps under one plan, on torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from qinvert.execution.tensors import TorchEvaluator, along
from qinvert.numerics import rounding
from qinvert.numerics.exact import integer_matmul, integer_multiply, planes
from qinvert.plan.integer_product import Accumulator, IntegerProduct, Residual
from qinvert.plan.quantization import Requantize
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.steps import Add, Exponential, MatMul, Multiply, Rescale, Scale, Subtract

#: Exact product of integer-valued tensors, dense or elementwise.
Times: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
#: Integers of every plane of an operand, high first.
Planes: TypeAlias = Sequence[torch.Tensor]


class IntegerEvaluator(TorchEvaluator):
    """Integer meaning of the steps under one plan."""

    def __init__(self, plan: QuantizedProgram, batch: int, device: torch.device) -> None:
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
        product = self.plan.products[step.output]
        terms = dict(zip((*step.add, *step.subtract), (*add, *subtract), strict=True))
        return self._product(
            product, left, right, terms, lambda a, b: integer_matmul(a, b, product.bound, product.magnitude)
        )

    def scale(self, step: Scale, source: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return self._elementwise(step, source, along(step, vector))

    def multiply(self, step: Multiply, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if self.plan.is_real(step):
            # A product of two dequantized operands, as float operators compute it.
            real = self._real(step.left, left) * self._real(step.right, right)
            return self._sum(step.output, [(real, 1.0)])
        return self._elementwise(step, left, right)

    def _real(self, name: str, value: torch.Tensor) -> torch.Tensor:
        grid = self.plan.grid(name)
        return rounding.dequantize(value, grid.scale, grid.format)

    def _elementwise(self, step: Scale | Multiply, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = self.plan.products[step.output]
        return self._product(product, left, right, {}, lambda a, b: integer_multiply(a, b, product.bound))

    def _product(
        self,
        product: IntegerProduct,
        left: torch.Tensor,
        right: torch.Tensor,
        terms: Mapping[str, torch.Tensor],
        multiply: Times,
    ) -> torch.Tensor:
        lefts = _integers(planes(left, product.left.scale, product.left.format))
        split = rounding.operand_planes if product.splits_right else planes
        rights = _integers(split(right, product.right.scale, product.right.format))
        totals = [_accumulated(part, lefts, rights, multiply) for part in product.accumulators]
        if product.requantize is Requantize.MULTIPLIER:
            for total, part in zip(totals, product.accumulators, strict=True):
                for term in part.residuals:
                    total += term.factor * self._residual(term, terms[term.tensor]).to(total.dtype)
            return self.requantized(totals, product)
        units = [part.unit for part in product.accumulators]
        addends = [*zip(totals[1:], units[1:], strict=True)]
        addends += [
            (self._planes(name, terms[name])[plane][0], scale) for name, plane, scale in product.addends
        ]
        grid = product.output
        return rounding.requantize_divide(
            totals[0], units[0], addends, grid.scale, grid.format, overwrite=True
        )

    def _residual(self, term: Residual, value: torch.Tensor) -> torch.Tensor:
        """Return the integers of a term that joins an accumulator."""
        if term.plane is None:
            return value
        grid = self.plan.tensors[term.tensor]
        return rounding.operand_planes(value, grid.scale, grid.format)[term.plane][0]

    def requantized(self, totals: list[torch.Tensor], product: IntegerProduct) -> torch.Tensor:
        """Return the integers of the accumulators of one or two planes; their memory may be reused."""
        grid = product.output
        return rounding.requantize_partial(totals, product.factor, grid.scale, grid.format, overwrite=True)

    def _planes(self, name: str, value: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
        grid = self.plan.grid(name)
        return planes(value, grid.scale, grid.format)

    def add(self, step: Add, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self._sum(step.output, [*self._planes(step.left, left), *self._right(step, right)])

    def _right(self, step: Add | Subtract, right: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
        if step.right in self.plan.tensors:
            return self._planes(step.right, right)
        grid = self.plan.term_grid(step)
        return [(grid.one * right, grid.scale)]

    def subtract(self, step: Subtract, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        negated = [(q, -scale) for q, scale in self._right(step, right)]
        return self._sum(step.output, [*self._planes(step.left, left), *negated])

    def exponential(self, step: Exponential, source: torch.Tensor) -> torch.Tensor:
        output = self.plan.tensors[step.output]
        return rounding.quantize_exponential(self._real(step.source, source), output.scale, output.format)

    def rescale(self, step: Rescale, source: torch.Tensor) -> torch.Tensor:
        if self.plan.keeps_integers(step):
            return source
        if step.factor == 1:
            return self._sum(step.output, self._planes(step.source, source))
        return self.multiplied(step, source)

    def multiplied(self, step: Rescale, source: torch.Tensor) -> torch.Tensor:
        """Return the integers of ``step.factor`` times the source."""
        output, value = self.plan.tensors[step.output], self._real(step.source, source)
        return rounding.requantize_scaled(value, 1.0, step.factor, output.scale, output.format)

    def _sum(self, name: str, terms: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
        (first, unit), *addends = terms
        output = self.plan.tensors[name]
        return rounding.requantize_divide(first, unit, addends, output.scale, output.format)


def _integers(parts: list[tuple[torch.Tensor, float]]) -> Planes:
    return [integers for integers, _ in parts]


def _accumulated(part: Accumulator, lefts: Planes, rights: Planes, multiply: Times) -> torch.Tensor:
    first, *others = part.pairs
    total = multiply(lefts[first.left], rights[first.right])
    for pair in others:
        total = total + multiply(lefts[pair.left], rights[pair.right])
    return total
