"""Interval propagation: which integers every tensor of a plan can hold.

    low <= q <= high for M   =>   low <= q <= high, elementwise, for every tensor

whatever the input is.  The steps run on pairs of ends: an interval is a batch
of two matrices, its low and its high end, so slices, masks and concats are
those of any execution.  Requantization is monotone in the accumulator and in
every term; its ends pass through the same `qinvert.numerics.rounding` functions that
the simulator calls.  Only products need interval arithmetic of their own.
Zeros above the diagonal are the interval ``[0, 0]``, so triangular structure
shortens the sums by itself.

Every operand is taken as independent of every other one: intervals are sound
for all inputs, and loose where terms cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import torch

from qinvert.checks import check_magnitude
from qinvert.errors import PlanError
from qinvert.execution.tensors import TorchEvaluator, along
from qinvert.formats import INT8, IntFormat
from qinvert.numerics import rounding, scales
from qinvert.numerics.accumulators import partial_factors, partial_products, planes
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Requantize
from qinvert.program.steps import BETA, INPUT, MAX_BETA, MIN_BETA, MOVES, Add, MatMul, Rescale, Scale

#: Receives a tensor's name and its ends, low and high, each ``[blocks, rows, columns]``.
Observer: TypeAlias = Callable[[str, torch.Tensor, torch.Tensor], None]
#: Integers and the signed real value of one step.
Term: TypeAlias = tuple[torch.Tensor, float]
#: Interval of a product of two intervals, and the largest sum of magnitudes in it.
Multiply: TypeAlias = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

#: A grid without ends, to see where a value lies before it saturates.
UNBOUNDED: Final = IntFormat(name="unbounded", container_bits=64, minimum=-(2**62), maximum=2**62)


class Accumulator(NamedTuple):
    """Integers that one accumulator of a product can hold, over all its elements."""

    #: Smallest final value.
    low: int
    #: Largest final value.
    high: int
    #: No partial sum exceeds this magnitude, in any order of summation.
    largest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """What `propagate` proved of a plan."""

    #: Accumulators of every MatMul and Scale, one per group of plane pairs, heaviest first.
    accumulators: Mapping[str, tuple[Accumulator, ...]]
    #: Tensors that saturate for no input: M, or results whose rounding stays inside the
    #: format.  What an earlier step clipped stays clipped.
    cannot_saturate: tuple[str, ...]


def propagate(plan: LayerPlan, limit: float | None = None, observe: Observer | None = None) -> Intervals:
    """Return what holds for every M with ``|M[i, j]| <= limit`` below the diagonal and 0 elsewhere.

    Parameters
    ----------
    plan : LayerPlan
    limit : float, optional
        In real units, such as max(beta); of K where the program is factored,
        with beta in [0, 2].  None promises nothing about M or beta: their
        quantization saturates, so the whole input grid is propagated.
    observe : callable, optional
        ``observe(name, low, high)`` receives the interval of every input and
        of every step's output.

    Raises
    ------
    PlanError
        If ``limit`` is no number of at least 0.
    """
    hint = "pass the largest |M| (such as max(beta)), or None for any M"
    bound = math.inf if limit is None else check_magnitude("limit", limit, PlanError, hint)
    evaluator = IntervalEvaluator(plan)

    def forward(name: str, value: torch.Tensor) -> None:
        if observe is not None:
            observe(name, *split(value))

    with torch.autocast("cpu", enabled=False):
        vectors = {name: evaluator.vector(name, bound) for name in plan.program.vectors}
        plan.program.evaluate(evaluator, evaluator.source(bound), forward, vectors)
    return Intervals(
        accumulators=evaluator.accumulators, cannot_saturate=_unsaturated(plan, evaluator.inside)
    )


def _unsaturated(plan: LayerPlan, inside: Mapping[str, bool]) -> tuple[str, ...]:
    proved = dict(inside)
    for step in plan.program.steps:
        if isinstance(step, MOVES):
            # Constants never saturate.
            proved[step.output] = all(proved.get(name, True) for name in step.inputs)
    return tuple(name for name in plan.program.tensors if proved[name])


def split(interval: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the low and the high end."""
    low, high = interval.reshape(-1, 2, *interval.shape[1:]).unbind(1)
    return low, high


def join(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Return the interval between two ends: a batch of two, blocks slowest."""
    return torch.stack([low, high], 1).flatten(0, 1)


def scaled(interval: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the interval of ``factor * q``, in float64."""
    return _oriented(interval.to(torch.float64), factor) * factor


def _oriented(interval: torch.Tensor, sign: float) -> torch.Tensor:
    # A negative factor makes the high end of a term the low end of the sum.
    low, high = split(interval)
    return join(high, low) if sign < 0 else interval


def magnitude(interval: torch.Tensor) -> torch.Tensor:
    """Return ``max|q|``, elementwise."""
    return torch.maximum(*(end.abs() for end in split(interval)))


def product(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the interval of ``a @ b``, and ``max sum_k |a_ik b_kj|``.

    With midpoints m and radii r of the factors, every ``a @ b`` lies within

        m_a m_b  +-  ((|m_a| + r_a) (|m_b| + r_b) - |m_a| |m_b|).

    The bound is attained where both factors are symmetric about 0, as they
    are here up to the one extra negative step of a grid; elsewhere it is at
    most 1.5 times too wide.  Float64 holds it exactly: all terms are multiples
    of 1/4 far below 2^51.

    References
    ----------
    S. M. Rump, "Fast and parallel interval arithmetic", BIT 39 (1999).
    """
    (a, a_largest), (b, b_largest) = _midpoint(left), _midpoint(right)
    middle = a @ b
    largest = a_largest @ b_largest
    radius = largest - a.abs() @ b.abs()
    return join(torch.ceil(middle - radius), torch.floor(middle + radius)), largest


def elementwise(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the interval of ``a * b``, spread over the larger shape, and ``max|a * b|``."""
    corners = torch.stack([a * b for a in split(left) for b in split(right)])
    ends = join(corners.amin(0), corners.amax(0))
    return ends, magnitude(ends)


def _midpoint(interval: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = split(interval.to(torch.float64))
    # |m| + r is the larger magnitude of the two ends.
    return (low + high) / 2, torch.maximum(low.abs(), high.abs())


class IntervalEvaluator(TorchEvaluator):
    """Steps of one plan on intervals of integers, ``[blocks * 2, rows, columns]`` in float32."""

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__(2, torch.float32, torch.device("cpu"))
        self.plan = plan
        #: Filled by every product.
        self.accumulators: dict[str, tuple[Accumulator, ...]] = {}
        #: Filled by every rounding: whether its value lies on the format's grid before it saturates.
        self.inside: dict[str, bool] = {}

    def source(self, limit: float) -> torch.Tensor:
        """Return the interval of M for ``|M[i, j]| <= limit``."""
        high = torch.full((1, self.plan.chunk, self.plan.chunk), limit, dtype=torch.float64).tril(-1)
        return self._quantized(INPUT, join(-high, high))

    def vector(self, name: str, limit: float) -> torch.Tensor:
        """Return the interval of beta as rows are divided by it, `qinvert.matrices.row_factors`."""
        assert name == BETA
        largest = math.inf if limit == math.inf else MAX_BETA
        low, high = (torch.full((1, self.plan.chunk, 1), end) for end in (MIN_BETA, largest))
        return self._quantized(name, join(low, high))

    def _quantized(self, name: str, ends: torch.Tensor) -> torch.Tensor:
        scale = self.plan.tensors[name].scale
        return self._round(name, lambda fmt: rounding.quantize(ends, scale, fmt))

    def matmul(
        self,
        step: MatMul,
        left: torch.Tensor,
        right: torch.Tensor,
        add: list[torch.Tensor],
        subtract: list[torch.Tensor],
    ) -> torch.Tensor:
        signed = [
            *((name, 1, value) for name, value in zip(step.add, add, strict=True)),
            *((name, -1, value) for name, value in zip(step.subtract, subtract, strict=True)),
        ]
        lefts = self._planes(step.left, left)
        rights = self._planes(step.right, right, rounding.operand_planes)
        if self.plan.requantize is Requantize.MULTIPLIER:
            residuals = [self._residual(step, name, sign, q) for name, sign, q in signed]
            terms = self._accumulators(step.output, product, lefts, rights, residuals)
            return self._partial(step, terms)
        terms = self._accumulators(step.output, product, lefts, rights, [])
        for name, sign, q in signed:
            terms += [(plane, sign * scale) for plane, scale in self._planes(name, q)]
        return self._sum(step.output, terms)

    def add(self, step: Add, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self._sum(step.output, [*self._planes(step.left, left), *self._planes(step.right, right)])

    def rescale(self, step: Rescale, source: torch.Tensor) -> torch.Tensor:
        if step.factor == 1:
            return self._sum(step.output, self._planes(step.source, source))
        grid, scale = self.plan.tensors[step.source], self.plan.tensors[step.output].scale
        value = _oriented(rounding.dequantize(source, grid.scale, grid.format), step.factor)
        return self._round(
            step.output, lambda fmt: rounding.requantize_scaled(value, 1.0, step.factor, scale, fmt)
        )

    def scale(self, step: Scale, source: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        lefts = self._planes(step.source, source)
        rights = self._planes(step.vector, along(step, vector), rounding.operand_planes)
        terms = self._accumulators(step.output, elementwise, lefts, rights, [])
        if self.plan.requantize is Requantize.DIVIDE:
            return self._sum(step.output, terms)
        return self._partial(step, terms)

    def _partial(self, step: MatMul | Scale, terms: list[Term]) -> torch.Tensor:
        name, factor, grid = step.output, self.plan.multiplier(step), self.plan.tensors[step.output]
        totals = [total for total, _ in terms]
        result = self._round(name, lambda fmt: rounding.requantize_partial(totals, factor, grid.scale, fmt))
        for total, weighted in zip(totals, partial_factors(factor, len(totals)), strict=True):
            part = rounding.requantize_multiplier(total, weighted, UNBOUNDED)
            legal = (grid.format.minimum <= part) & (part <= grid.format.maximum)
            self.inside[name] &= bool(legal.all())
        return result

    def _residual(self, step: MatMul, name: str, sign: int, interval: torch.Tensor) -> list[torch.Tensor]:
        """Intervals that a residual adds to every accumulator."""
        if name == step.right:
            planes = self._planes(name, interval, rounding.operand_planes)
            factor = sign * self.plan.residual_factor(step, name)
            return [scaled(plane, factor) for plane, _ in planes]
        return [scaled(interval, sign * factor) for factor in self.plan.identity_planes(step, name)]

    def _planes(
        self,
        name: str,
        interval: torch.Tensor,
        way: Callable[[torch.Tensor, float, IntFormat], list[Term]] = planes,
    ) -> list[Term]:
        grid = self.plan.tensors[name]
        terms = way(interval, grid.scale, grid.format)
        if len(terms) == 1:
            return terms
        high, (low, scale) = terms
        return [high, (_low_plane(high[0], low), scale)]

    def _accumulators(
        self,
        output: str,
        multiply: Multiply,
        lefts: list[Term],
        rights: list[Term],
        residuals: list[list[torch.Tensor]],
    ) -> list[Term]:
        totals, records = [], []
        for plane, pairs in enumerate(partial_products(len(lefts), len(rights))):
            parts = [multiply(lefts[i][0], rights[j][0]) for i, j in pairs]
            parts += [(residual[plane], magnitude(residual[plane])) for residual in residuals]
            total, largest = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
            low, high = split(total)
            records.append(Accumulator(int(low.min()), int(high.max()), int(largest.max())))
            i, j = pairs[0]
            totals.append((total, scales.product_scale(lefts[i][1], rights[j][1])))
        self.accumulators[output] = tuple(records)
        return totals

    def _sum(self, name: str, terms: list[Term]) -> torch.Tensor:
        (first, unit), *addends = [(_oriented(ends, scale), scale) for ends, scale in terms]
        scale = self.plan.tensors[name].scale
        return self._round(name, lambda fmt: rounding.requantize_divide(first, unit, addends, scale, fmt))

    def _round(self, name: str, requantize: Callable[[IntFormat], torch.Tensor]) -> torch.Tensor:
        fmt = self.plan.tensors[name].format
        free = requantize(UNBOUNDED)
        self.inside[name] = bool(((fmt.minimum <= free) & (free <= fmt.maximum)).all())
        return requantize(fmt)


def _low_plane(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    # Between two different high planes, the low one takes every value.
    first, second = split(high)
    start, stop = split(low)
    same = first == second
    return join(torch.where(same, start, float(INT8.minimum)), torch.where(same, stop, float(INT8.maximum)))
