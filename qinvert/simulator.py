"""Runs a `LayerPlan` in exact integer arithmetic.

Values are integer-valued float32 tensors (see `qinvert.arithmetic`), so the
same code runs batched on a CPU or a CUDA device and gives the same bits on
both: products and accumulators are exact integers whatever the kernel, and
the few float32 operations around them are IEEE operations, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import torch

from qinvert import arithmetic, hexagon
from qinvert.accumulators import integer_matmul, operand_magnitudes, partial_products, planes
from qinvert.errors import PlanError, lookup
from qinvert.execute import TorchEvaluator, along, assemble, program_inputs
from qinvert.plan import LayerPlan, Quantization, Requantize
from qinvert.steps import INPUT, Add, MatMul, Rescale, Scale

Observer = Callable[[str, torch.Tensor], None]
#: Exact product of integer-valued tensors, dense or elementwise.
Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Rounding(StrEnum):
    """Whose integers a simulation returns."""

    #: Those that ONNX says: float32 operations, half to even.
    ONNX = "onnx"
    #: Those of Qualcomm's Hexagon, of int8 plans; see `qinvert.hexagon`.
    HEXAGON = "hexagon"

    @staticmethod
    def named(name: str) -> Rounding:
        """Return the member of that name.

        Raises
        ------
        PlanError
            If there is none.
        """
        return lookup({str(rounding): rounding for rounding in Rounding}, name, "rounding", PlanError)


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
        return arithmetic.requantize_divide(
            accumulator, unit, addends, output.scale, output.format, overwrite=True
        )

    def requantized(self, totals: list[torch.Tensor], factor: float, output: Quantization) -> torch.Tensor:
        """Return the integers of accumulators that are nobody else's, one or two planes of them."""
        return arithmetic.requantize_partial(totals, factor, output.scale, output.format, overwrite=True)

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
        rights = arithmetic.operand_planes(right, right_grid.scale, right_grid.format)
        accumulators = []
        for pairs in partial_products(len(lefts), len(rights)):
            (i, j), *others = pairs
            total = multiply(lefts[i][0], rights[j][0])
            for k, m in others:
                total = total + multiply(lefts[k][0], rights[m][0])
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

    def scale(self, step: Scale, source: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        tensors, output = self.plan.tensors, self.plan.tensors[step.output]
        # One product an element, at most 2^22: exact in float32.
        terms = self._accumulators(
            tensors[step.source], tensors[step.vector], source, along(step, vector), torch.mul
        )
        if self.plan.requantize is Requantize.MULTIPLIER:
            totals = [total for total, _ in terms]
            return arithmetic.requantize_partial(
                totals, self.plan.multiplier(step), output.scale, output.format
            )
        return self._sum(step.output, terms)

    def _sum(self, name: str, terms: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
        (first, unit), *addends = terms
        output = self.plan.tensors[name]
        return arithmetic.requantize_divide(first, unit, addends, output.scale, output.format)


class HexagonEvaluator(IntegerEvaluator):
    """Integer meaning of the steps on Hexagon, of plans that `hexagon.check_plan` takes."""

    def requantized(self, totals: list[torch.Tensor], factor: float, output: Quantization) -> torch.Tensor:
        (total,) = totals
        return hexagon.requantize(total, factor, output.format)

    def _sum(self, name: str, terms: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
        output = self.plan.tensors[name]
        return hexagon.add(terms, output.scale, output.format)


def simulate_inverse(
    plan: LayerPlan,
    lower: torch.Tensor,
    observe: Observer | None = None,
    beta: torch.Tensor | None = None,
    rounding: Rounding = Rounding.ONNX,
) -> torch.Tensor:
    """`LayerPlan.inverse` of checked tensors; float32 on L's device.

    On a CUDA device a fused kernel computes the same bits where there is one,
    see `qinvert.kernels.solve_tril`; ``observe`` needs every tensor, which a
    kernel never stores.

    Raises
    ------
    InputError
        If ``lower`` holds a NaN.
    PlanError
        If that rounding is not known of the plan.
    """
    if lower.is_cuda and observe is None and rounding is Rounding.ONNX:
        from qinvert.kernels.solving import fused_inverse

        if (found := fused_inverse(plan, lower)) is not None:
            return found[0]
    return simulate_batched(plan, lower, observe, beta, rounding)


def simulate_counting(
    plan: LayerPlan,
    lower: torch.Tensor,
    beta: torch.Tensor | None = None,
    rounding: Rounding = Rounding.ONNX,
) -> tuple[torch.Tensor, dict[str, int]]:
    """`simulate_inverse`, and how many values of each tensor stand on the ends of its grid, if any."""
    if lower.is_cuda and rounding is Rounding.ONNX:
        from qinvert.kernels.solving import fused_inverse

        if (found := fused_inverse(plan, lower, count=True)) is not None:
            return found
    counts: dict[str, int] = {}

    def count(name: str, integers: torch.Tensor) -> None:
        fmt = plan.tensors[name].format
        number = int(((integers <= fmt.minimum) | (integers >= fmt.maximum)).sum())
        if number:
            counts[name] = number

    return simulate_batched(plan, lower, count, beta, rounding), counts


def simulate_batched(
    plan: LayerPlan,
    lower: torch.Tensor,
    observe: Observer | None = None,
    beta: torch.Tensor | None = None,
    rounding: Rounding = Rounding.ONNX,
) -> torch.Tensor:
    """`simulate_inverse` by one torch operation a step, over all matrices at once."""
    result = simulate_integers(plan, lower, observe, beta, rounding)
    values = arithmetic.dequantize(result, plan.output.scale, plan.output.format)
    return assemble(plan.program, values, beta)


def simulate_integers(
    plan: LayerPlan,
    lower: torch.Tensor,
    observe: Observer | None = None,
    beta: torch.Tensor | None = None,
    rounding: Rounding = Rounding.ONNX,
) -> torch.Tensor:
    """Integers of the program's output for checked tensors, as integer-valued float32.

    ``observe(name, integers)`` receives the inputs and every step's output.
    """
    evaluate, quantize = IntegerEvaluator, arithmetic.quantize
    if rounding is Rounding.HEXAGON:
        hexagon.check_plan(plan)
        evaluate, quantize = HexagonEvaluator, hexagon.quantize
    inputs = {
        name: quantize(value, plan.tensors[name].scale, plan.tensors[name].format)
        for name, value in program_inputs(plan.program, lower, beta, torch.float32).items()
    }
    source = inputs.pop(INPUT)
    evaluator = evaluate(plan, source.shape[0], source.device)
    # Autocast would run the products of the float32 integers in 16-bit accumulators.
    with torch.autocast(source.device.type, enabled=False):
        return plan.program.evaluate(evaluator, source, observe, inputs).reshape(lower.shape)
