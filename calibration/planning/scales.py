"""From ranges to scales: one quantization per group of tensors that share a grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from qinvert.calibration.choices import ScaleRule as ScaleRule
from qinvert.formats import IntFormat
from qinvert.numerics import scales
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.program import Program
from qinvert.program.scale_groups import scale_groups as scale_groups
from qinvert.program.steps import MatMul

#: Scales stay between these powers of two, inside what `qinvert.numerics.scales.check_scale` takes.
SMALLEST = 2.0**-99
LARGEST = 2.0**49
#: 1.0 on a grid is at most this many times the grid's largest integer: a graph
#: that widens a product by identity blocks needs that many of them.
MAX_IDENTITY_BLOCKS = 16
#: What an int16 range maps onto.  The integers above it are headroom: the int8 planes of a
#: right operand end at 32639, and one partial product may exceed the sum of both.
WIDE_LARGEST = 32256
#: Largest product of the ranges of both operands of an int16 product, over the range of the
#: result: where more cancels, one partial product saturates on the grid of the sum.
MAX_CANCELLATION = 16.0
#: A range may be raised against cancellation up to this share of M's and of the result's: its
#: grid then adds at most 1/16 of the noise power that theirs do.
RAISED_SHARE = 0.25
#: Grids of M and of the result may be this much coarser to hold 1.0: 1 dB.
MAX_RECIPROCAL_COST = 1.12
#: A grid may be this much coarser so that 1.0 is one of its integers, 0.5 dB: tensors then
#: carry an identity on their diagonal, and no product is widened.
CARRIED_COST = 1.06
#: A reciprocal of an odd integer is preferred while it is at most this much coarser.
TIE_FREE_COST = 1.02


def residual_partners(program: Program) -> set[str]:
    """Return the tensors on whose grid a residual term needs the integer 1 / scale."""
    partners = set()
    for step in program.steps:
        if isinstance(step, MatMul):
            for term in (*step.add, *step.subtract):
                partners.add(step.left if term == step.right else step.right)
    return partners


def allows_multiplier(
    program: Program, ranges: Mapping[str, float], formats: Mapping[str, IntFormat], rule: ScaleRule
) -> bool:
    """Whether residual terms can be integers of the accumulator.

    Each term must be an operand of its product, and 1.0 must lie on the grid of
    the other operand, whose range must not exceed its largest integer.  All
    formats must have one plane, and int16 products must not cancel (see
    `hold_partial_products`).  Matrices that would lose resolution on such a grid,
    because they are very small or larger than a few units, are also refused.
    """
    operands = all(
        term in (step.left, step.right)
        for step in program.steps
        if isinstance(step, MatMul)
        for term in (*step.add, *step.subtract)
    )
    partners = residual_partners(program)
    shared = group_ranges(program, ranges)
    fits = all(shared[name] <= formats[name].largest for name in partners)
    single = all(fmt.planes == 1 for fmt in formats.values())
    costs = [
        choose_scale(shared[name], formats[name], rule, reciprocal=True)
        / choose_scale(shared[name], formats[name], rule)
        for name in (program.inverse_ports.matrix, program.inverse_ports.result)
    ]
    cancels = any(shared[step.output] < floor for step, floor in _partial_products(program, shared, formats))
    return (
        single and operands and fits and not cancels and not (partners and max(costs) > MAX_RECIPROCAL_COST)
    )


def hold_partial_products(
    program: Program, ranges: Mapping[str, float], formats: Mapping[str, IntFormat]
) -> dict[str, float]:
    """Return ``ranges``, raised where partial products of int16 would saturate and resolution allows it."""
    groups = scale_groups(program)
    raised, shared = dict(ranges), group_ranges(program, ranges)
    ports = program.inverse_ports
    limit = RAISED_SHARE * min(shared[ports.matrix], shared[ports.result])
    # A product that is raised is an operand of later ones, so shared grows while it is read.
    for step, floor in _partial_products(program, shared, formats):
        if shared[step.output] < floor <= limit:
            group = {name for name in shared if groups[name] == groups[step.output]}
            raised |= dict.fromkeys(group, floor)
            shared |= dict.fromkeys(group, floor)
    return raised


def _partial_products(
    program: Program, shared: Mapping[str, float], formats: Mapping[str, IntFormat]
) -> Iterator[tuple[MatMul, float]]:
    """Yield every product of int16 with the range that holds its partial products."""
    for step in program.steps:
        if isinstance(step, MatMul) and formats[step.right].is_split:
            yield step, shared[step.left] * shared[step.right] / MAX_CANCELLATION


def group_ranges(program: Program, ranges: Mapping[str, float]) -> dict[str, float]:
    """Return for every tensor the largest range within its group."""
    groups = scale_groups(program)
    largest: dict[str, float] = {}
    for name, group in groups.items():
        largest[group] = max(largest.get(group, 0.0), ranges[name])
    return {name: largest[group] for name, group in groups.items()}


def choose_quantizations(
    program: Program,
    ranges: Mapping[str, float],
    formats: Mapping[str, IntFormat],
    rule: ScaleRule,
    requantize: Requantize,
) -> dict[str, Quantization]:
    """Return the finest legal quantization of every tensor that covers its group's range.

    Parameters
    ----------
    program : Program
    ranges : mapping
        max|x| per tensor; infinite where the method overflowed.
    formats : mapping
        Format per tensor, the same within a group.
    rule : ScaleRule
    requantize : Requantize
        `MULTIPLIER` makes the scales of `residual_partners` reciprocals.
    """
    shared = group_ranges(program, ranges)
    groups = scale_groups(program)
    reciprocal: set[str] = set()
    if requantize is Requantize.MULTIPLIER:
        reciprocal = {groups[name] for name in residual_partners(program)}
    return {
        name: Quantization(
            format=formats[name], scale=choose_scale(limit, formats[name], rule, groups[name] in reciprocal)
        )
        for name, limit in shared.items()
    }


def choose_scale(limit: float, fmt: IntFormat, rule: ScaleRule, reciprocal: bool = False) -> float:
    """Return the smallest legal scale with ``largest * scale >= limit``, up to float32 rounding.

    ``largest`` is the format's, of int16 `WIDE_LARGEST`.

    Parameters
    ----------
    limit : float
        Range to cover; 0 (an all-zero tensor) is treated as 1, Inf as the
        largest legal scale.
    fmt : IntFormat
        The scale of a float32 is 1.
    rule : ScaleRule
    reciprocal : bool
        Only ``float32(1 / k)`` for an odd integer k up to `MAX_IDENTITY_BLOCKS`
        times ``fmt.largest``.
    """
    if fmt.is_float:
        return 1.0
    largest = WIDE_LARGEST if fmt.is_split else fmt.largest
    wanted = min(max((limit or 1.0) / largest, SMALLEST), LARGEST)
    if reciprocal:
        wanted = max(wanted, 1 / (MAX_IDENTITY_BLOCKS * largest))
    if rule is ScaleRule.POW2:
        return _power_of_two(wanted)
    tie_free = 1 / _odd_below(1 / wanted)
    if reciprocal and 1 < 1 / (tie_free * largest) <= CARRIED_COST:
        tie_free = 1 / _odd_below(largest)
    if reciprocal or wanted <= tie_free * (1 + 1e-4) <= TIE_FREE_COST * wanted:
        return scales.float32(tie_free)
    return scales.float32(wanted)


def _odd_below(value: float) -> int:
    # On grids 1/k with odd k no exact ties arise: twice an accumulator is never an odd
    # multiple of odd denominators, so float and fixed-point back ends round alike.
    # A range of 1.0 seen as 1 + 1e-7 must not cost a whole integer.
    k = max(1, math.floor(value + 1e-4))
    return k if k % 2 else k - 1


def _power_of_two(wanted: float) -> float:
    # A range of 1.0 seen as 1 + 1e-7 must not cost a whole bit.
    return 2.0 ** math.ceil(math.log2(wanted) - 1e-5)
