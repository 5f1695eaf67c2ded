"""From the largest value seen to the range that a grid covers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch

from qinvert.calibration.choices import RangeRule as RangeRule
from qinvert.calibration.choices import ScaleRule
from qinvert.calibration.planning.scales import choose_scale, scale_groups
from qinvert.execution.floating import run_systems
from qinvert.formats import IntFormat
from qinvert.numerics import rounding
from qinvert.program.program import Program
from qinvert.program.steps import MOVES
from qinvert.systems import Systems

#: Share of magnitudes that a percentile range covers.
PERCENTILE: Final = 0.9999
#: Ranges that the MSE rule tries, as shares of the largest value: six steps an octave.
TRIED: Final = tuple(math.exp2(-k / 6) for k in range(31))
#: A group whose values stay this far below its range holds rounding residue.
VANISHING: Final = 1e-3


def clip_ranges(
    program: Program,
    ranges: Mapping[str, float],
    sample: Systems,
    formats: Mapping[str, IntFormat],
    rule: RangeRule,
) -> dict[str, float]:
    """Return ``ranges`` narrowed by ``rule``, group by group.

    Values beyond the range saturate.  Statistics are those of the sample, a
    uniform random choice of all matrices; ranges that overflowed do not change.

    Parameters
    ----------
    program : Program
    ranges : mapping
        Range per tensor, with whatever room calibration adds.
    sample : Systems
        Flat systems, with beta where the program takes it.
    formats : mapping
        Format of every tensor.
    rule : RangeRule
    """
    if rule is RangeRule.MAX:
        return dict(ranges)
    groups = scale_groups(program)
    values = _group_values(program, groups, sample, ranges)
    clipped = {}
    for group, magnitudes in values.items():
        largest = max(r for name, r in ranges.items() if groups[name] == group)
        clipped[group] = clip_range(magnitudes, largest, formats[group], rule)
    return {name: min(r, clipped[groups[name]]) for name, r in ranges.items()}


def _group_values(
    program: Program, groups: Mapping[str, str], sample: Systems, ranges: Mapping[str, float]
) -> dict[str, torch.Tensor]:
    parts: dict[str, list[torch.Tensor]] = {group: [] for group in groups.values()}
    moved = {s.output for s in program.steps if isinstance(s, MOVES)}
    partial = program.partial_tensors

    def observe(name: str, tensor: torch.Tensor) -> None:
        # Steps that only move values repeat what other tensors of their group hold.
        if name not in moved:
            magnitudes = tensor.abs().flatten()
            # No result depends on what a partial tensor holds beyond its range.
            limit = ranges[name] if name in partial else math.inf
            parts[groups[name]].append(magnitudes[(magnitudes > 0) & (magnitudes <= limit)])

    run_systems(program, sample, torch.float64, observe)
    return {group: torch.cat(tensors) for group, tensors in parts.items()}


def clip_range(magnitudes: torch.Tensor, largest: float, fmt: IntFormat, rule: RangeRule) -> float:
    """Return the range that a rule chooses for magnitudes above 0, at most ``largest``."""
    # A residue shows its range only once its operands are rounded, so there is nothing to clip here.
    vanishes = magnitudes.numel() == 0 or float(magnitudes.max()) < VANISHING * largest
    if vanishes or not math.isfinite(largest):
        return largest
    if rule is RangeRule.PERCENTILE:
        index = min(len(magnitudes) - 1, math.ceil(PERCENTILE * len(magnitudes)))
        kth: torch.Tensor = magnitudes.kthvalue(index + 1).values
        return float(kth)
    return min((largest * share for share in TRIED), key=lambda limit: _error(magnitudes, limit, fmt))


def _error(magnitudes: torch.Tensor, limit: float, fmt: IntFormat) -> float:
    scale = choose_scale(limit, fmt, ScaleRule.FLOAT)
    rounded = rounding.dequantize(rounding.quantize(magnitudes, scale, fmt), scale, fmt)
    error: torch.Tensor = rounded - magnitudes
    return float(error.square().sum())
