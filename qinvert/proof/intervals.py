"""Interval propagation: which integers every tensor of a plan can hold.

    low <= q <= high for M   =>   low <= q <= high, elementwise, for every tensor

whatever the input is.  The steps run on pairs of ends: an interval is a batch
of two matrices, its low and its high end, so slices, masks and concats are the
same as in any execution.  Requantization is monotone in the accumulator and in
every term, so its ends pass through the functions of
`qinvert.numerics.rounding` that the simulator also calls.  Only products need
interval arithmetic of their own.  Zeros above the diagonal are the interval
``[0, 0]``, so sums are shorter where a matrix is triangular.

Every operand is taken as independent of all others: intervals are correct for
all inputs, but they are wider than necessary where terms cancel.
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
from qinvert.formats import FLOAT32, IntFormat
from qinvert.numerics import rounding
from qinvert.numerics.exact import planes
from qinvert.plan.integer_product import Accumulator as PlanAccumulator
from qinvert.plan.integer_product import IntegerProduct, Product, Residual, operands
from qinvert.plan.quantization import Requantize
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.ports import Meaning, Port
from qinvert.program.steps import (
    MAX_BETA,
    MIN_BETA,
    MOVES,
    Add,
    Exponential,
    MatMul,
    Multiply,
    Rescale,
    Scale,
    Subtract,
)
from qinvert.proof.interval_arithmetic import (
    elementwise,
    join,
    low_plane,
    low_plane_saturates,
    magnitude,
    oriented,
    product,
    scaled,
    split,
)

#: Receives a tensor's name and its ends, low and high, each ``[blocks, rows, columns]``.
Observer: TypeAlias = Callable[[str, torch.Tensor, torch.Tensor], None]
#: Integers and the signed real value of one step.
Term: TypeAlias = tuple[torch.Tensor, float]
#: Interval of a product of two intervals, and the largest sum of magnitudes in it.
Times: TypeAlias = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

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

    #: Accumulators of every product, one per group of plane pairs, heaviest first.
    accumulators: Mapping[str, tuple[Accumulator, ...]]
    #: Tensors that do not saturate for any input: M, or results whose rounding stays inside
    #: the format.  What an earlier step clipped stays clipped.
    cannot_saturate: tuple[str, ...]


def propagate(
    plan: QuantizedProgram,
    limit: float | Mapping[str, float] | None = None,
    observe: Observer | None = None,
) -> Intervals:
    """Return what holds for all inputs whose magnitude stays within ``limit``.

    Strictly lower triangular inputs are zero on the diagonal and above.

    Parameters
    ----------
    plan : QuantizedProgram
    limit : float or mapping, optional
        Largest magnitude in real units: of M, such as max(beta); of K where an
        inverse is factored, with beta in [0, 2]; of every input where the program
        has others.  A mapping gives limits by the names of inputs.  None promises
        nothing: inputs saturate when they are quantized, so that their whole grids
        are propagated.
    observe : callable, optional
        ``observe(name, low, high)`` receives the interval of every input and
        of every step's output.

    Raises
    ------
    PlanError
        If a limit is not a number of at least 0, or does not belong to an input.
    """
    limits = _limits(plan, limit)
    evaluator = IntervalEvaluator(plan)

    def forward(name: str, value: torch.Tensor) -> None:
        if observe is not None:
            observe(name, *split(value))

    with torch.autocast("cpu", enabled=False):
        inputs = {port.name: evaluator.source(port, limits[port.name]) for port in plan.program.inputs}
        plan.program.evaluate(evaluator, inputs, forward)
    return Intervals(
        accumulators=evaluator.accumulators, cannot_saturate=_unsaturated(plan, evaluator.inside)
    )


def _limits(plan: QuantizedProgram, limit: float | Mapping[str, float] | None) -> dict[str, float]:
    """Return the largest magnitude of every input, infinite where nothing is promised."""
    hint = "pass the largest |M| (such as max(beta)), or None for any M"
    names = [port.name for port in plan.program.inputs]
    if limit is None:
        return dict.fromkeys(names, math.inf)
    if not isinstance(limit, Mapping):
        return dict.fromkeys(names, check_magnitude("limit", limit, PlanError, hint))
    unknown = [name for name in limit if name not in names]
    if unknown:
        raise PlanError(
            f"limit of {unknown[0]!r}, which is not an input; the program takes {', '.join(names)}"
        )
    found = {
        name: check_magnitude(f"limit of {name}", value, PlanError, hint) for name, value in limit.items()
    }
    return {name: found.get(name, math.inf) for name in names}


def _unsaturated(plan: QuantizedProgram, inside: Mapping[str, bool]) -> tuple[str, ...]:
    proved = dict(inside)
    for step in plan.program.steps:
        if isinstance(step, MOVES):
            # Constants never saturate.
            proved[step.output] = all(proved.get(name, True) for name in step.inputs)
    return tuple(name for name in plan.program.tensors if proved[name])


class IntervalEvaluator(TorchEvaluator):
    """Steps of one plan on intervals of integers, ``[blocks * batch * 2, rows, columns]`` in float32."""

    def __init__(self, plan: QuantizedProgram, batch: int = 1) -> None:
        super().__init__(2 * batch, torch.float32, torch.device("cpu"))
        self.plan = plan
        #: Filled by every product.
        self.accumulators: dict[str, tuple[Accumulator, ...]] = {}
        #: Filled by every rounding: whether its value lies on the format's grid before it saturates.
        self.inside: dict[str, bool] = {}

    def source(self, port: Port, limit: float) -> torch.Tensor:
        """Return the interval of an input with ``|x| <= limit``."""
        _, rows, columns = port.shape
        if port.meaning is Meaning.BETA:
            # These are the limits of the divisor of rows, see `qinvert.matrices.row_factors`.
            largest = math.inf if limit == math.inf else MAX_BETA
            low, high = (
                torch.full((1, rows, columns), end, dtype=torch.float64) for end in (MIN_BETA, largest)
            )
            return self._quantized(port.tensor, join(low, high))
        if self.plan.tensors[port.tensor].format.is_float:
            # Zero times infinity is no number; the largest float32 stands for it.
            limit = min(limit, float(FLOAT32.maximum))
        high = torch.full((1, rows, columns), limit, dtype=torch.float64)
        high = high.tril(-1) if port.meaning.strictly_lower else high
        return self._quantized(port.tensor, join(-high, high))

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
        terms = dict(zip((*step.add, *step.subtract), (*add, *subtract), strict=True))
        lefts = self._planes(step.left, left)
        rights = self._planes(step.right, right, rounding.operand_planes)
        return self._product(step, product, lefts, rights, terms)

    def scale(self, step: Scale, source: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return self._elementwise(step, source, along(step, vector))

    def multiply(self, step: Multiply, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if self.plan.is_real(step):
            reals = (self._real(name, x) for name, x in ((step.left, left), (step.right, right)))
            ends, _ = elementwise(*reals)
            return self._sum(step.output, [(ends, 1.0)])
        return self._elementwise(step, left, right)

    def _real(self, name: str, interval: torch.Tensor) -> torch.Tensor:
        grid = self.plan.grid(name)
        return rounding.dequantize(interval, grid.scale, grid.format)

    def _elementwise(self, step: Scale | Multiply, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        names = operands(step)
        lefts, rights = (self._planes(n, x) for n, x in zip(names, (left, right), strict=True))
        return self._product(step, elementwise, lefts, rights, {})

    def _product(
        self,
        step: Product,
        multiply: Times,
        lefts: list[Term],
        rights: list[Term],
        terms: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        reading = self.plan.products[step.output]
        totals, records = [], []
        for part in reading.accumulators:
            parts = [multiply(lefts[i][0], rights[j][0]) for i, j in part.pairs]
            parts += [(r, magnitude(r)) for r in (self._residual(t, terms[t.tensor]) for t in part.residuals)]
            total, largest = (torch.stack(p).sum(0) for p in zip(*parts, strict=True))
            total = self.opened(reading, part, total, largest)
            low, high = split(total)
            records.append(Accumulator(int(low.min()), int(high.max()), int(largest.max())))
            totals.append(total)
        self.accumulators[step.output] = tuple(records)
        if reading.requantize is Requantize.MULTIPLIER:
            return self._partial(reading, totals)
        units = [part.unit for part in reading.accumulators]
        addends = [
            (self._planes(name, terms[name])[plane][0], scale) for name, plane, scale in reading.addends
        ]
        return self._sum(step.output, [*zip(totals, units, strict=True), *addends])

    def opened(
        self, reading: IntegerProduct, part: PlanAccumulator, total: torch.Tensor, largest: torch.Tensor
    ) -> torch.Tensor:
        """Return what an accumulator holds before it is rounded: here the exact integers."""
        return total

    def add(self, step: Add, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self._sum(step.output, [*self._planes(step.left, left), *self._right(step, right)])

    def _right(self, step: Add | Subtract, right: torch.Tensor) -> list[Term]:
        if step.right in self.plan.tensors:
            return self._planes(step.right, right)
        grid = self.plan.term_grid(step)
        return [(scaled(right, grid.one), grid.scale)]

    def subtract(self, step: Subtract, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        negated = [(ends, -scale) for ends, scale in self._right(step, right)]
        return self._sum(step.output, [*self._planes(step.left, left), *negated])

    def exponential(self, step: Exponential, source: torch.Tensor) -> torch.Tensor:
        scale, value = self.plan.tensors[step.output].scale, self._real(step.source, source)
        return self._round(step.output, lambda fmt: rounding.quantize_exponential(value, scale, fmt))

    def rescale(self, step: Rescale, source: torch.Tensor) -> torch.Tensor:
        if self.plan.keeps_integers(step):
            self.inside[step.output] = True
            return source
        if step.factor == 1:
            return self._sum(step.output, self._planes(step.source, source))
        scale = self.plan.tensors[step.output].scale
        value = oriented(self._real(step.source, source), step.factor)
        return self._round(
            step.output, lambda fmt: rounding.requantize_scaled(value, 1.0, step.factor, scale, fmt)
        )

    def _partial(self, reading: IntegerProduct, totals: list[torch.Tensor]) -> torch.Tensor:
        name, factor, grid = reading.step.output, reading.factor, reading.output
        result = self._round(name, lambda fmt: rounding.requantize_partial(totals, factor, grid.scale, fmt))
        for total, weighted in zip(totals, reading.factors, strict=True):
            part = rounding.requantize_multiplier(total, weighted, UNBOUNDED)
            legal = (grid.format.minimum <= part) & (part <= grid.format.maximum)
            self.inside[name] &= bool(legal.all())
        return result

    def _residual(self, term: Residual, interval: torch.Tensor) -> torch.Tensor:
        """Interval of what a residual adds to an accumulator."""
        if term.plane is not None:
            interval = self._planes(term.tensor, interval, rounding.operand_planes)[term.plane][0]
        return scaled(interval, term.factor)

    def _planes(
        self,
        name: str,
        interval: torch.Tensor,
        way: Callable[[torch.Tensor, float, IntFormat], list[Term]] = planes,
    ) -> list[Term]:
        grid = self.plan.grid(name)
        terms = way(interval, grid.scale, grid.format)
        if len(terms) == 1:
            return terms
        high, (low, scale) = terms
        return [high, (low_plane(high[0], low), scale)]

    def _sum(self, name: str, terms: list[Term]) -> torch.Tensor:
        (first, unit), *addends = [(oriented(ends, scale), scale) for ends, scale in terms]
        scale = self.plan.tensors[name].scale
        return self._round(name, lambda fmt: rounding.requantize_divide(first, unit, addends, scale, fmt))

    def _round(self, name: str, requantize: Callable[[IntFormat], torch.Tensor]) -> torch.Tensor:
        fmt = self.plan.tensors[name].format
        if fmt.is_float:
            self.inside[name] = True
            return requantize(fmt)
        free = requantize(UNBOUNDED)
        legal = (fmt.minimum <= free) & (free <= fmt.maximum)
        self.inside[name] = bool(legal.all()) and not (fmt.planes > 1 and low_plane_saturates(free))
        return requantize(fmt)
