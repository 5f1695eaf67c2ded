"""From what was seen to the grid of every tensor of a chunk step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from qinvert.calibration.choices import ScaleRule
from qinvert.calibration.chunk_steps.observation import Observed
from qinvert.calibration.chunk_steps.widths import Widths
from qinvert.calibration.planning.scales import choose_quantizations, residual_partners
from qinvert.chunk_step.ports import (
    BETA,
    LOG_DECAY,
    MAX_LOG_DECAY,
    READ_STATE,
    STATE,
    beyond_decays,
    carried_tensors,
)
from qinvert.formats import INT8, IntFormat
from qinvert.numerics.exponentials import safe_scale
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.plan.value_channels import MAX_EXPONENT, ValueChannels
from qinvert.program.program import Program
from qinvert.program.steps import Exponential

#: A proved range is taken where it is at most this many times what was seen, 2 dB; else what was seen.
PROVED_SHARE: Final = 1.25
#: Where 8-bit sums of log decays are cut off at the latest: exp(-8) is 0.04 steps of a grid of 1/127.
NARROW_LOG_DECAY: Final = 8.0
#: Room above what was seen for values of more than 8 bits, whose steps are small.
WIDE_ROOM: Final = 2.0
#: The same for a state of more than 8 bits: it grows with the length of the context.
STATE_ROOM: Final = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomRules:
    """How much room ranges get for what the data did not show."""

    #: Times what was seen, for a state; None means 4 for more than 8 bits, else 1.
    state_margin: float | None = None
    #: Whether the state is carried in float32: it needs no room, but what products read of it does.
    float_state: bool = False

    def of(self, name: str, fmt: IntFormat) -> float:
        """Return the factor for a tensor of a group of values."""
        wide = fmt.planes * fmt.container_bits > INT8.container_bits
        if name == (READ_STATE if self.float_state else STATE):
            return self.state_margin or (STATE_ROOM if wide else 1.0)
        return WIDE_ROOM if wide else 1.0


def value_exponents(observed: Observed, tensors: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """``e = round(mean over tensors of log2(max|x|))`` of every head and channel.

    After division by 2^e all channels of one tensor reach 0.7 to 1.4.  A channel that is always
    zero takes the smallest value of the others.
    """
    logs = torch.stack([_log_largest(observed.largest[name]) for name in tensors]).mean(0)
    return tuple(tuple(map(_exponent, row)) for row in logs.tolist())


def _exponent(log: float) -> int:
    return round(max(-MAX_EXPONENT, min(MAX_EXPONENT, log)))


def _log_largest(largest: torch.Tensor) -> torch.Tensor:
    wide = largest.to(torch.float64)
    seen = wide[wide > 0]
    return torch.log2(wide.clamp(min=float(seen.min()) if seen.numel() else 1.0))


def seen_ranges(program: Program, observed: Observed, channels: ValueChannels | None) -> dict[str, float]:
    """Return max|x| of every tensor as the integers hold it, its channels divided by their factors."""
    found = {}
    for name in program.tensors:
        largest = observed.largest[name].to(torch.float64)
        if channels is not None and largest.shape[-1] > 1:
            largest = largest * torch.exp2(-torch.tensor(channels.exponents, dtype=torch.float64))
        found[name] = float(largest.max())
    return found


def proved_ranges(program: Program, max_beta: float) -> dict[str, float]:
    """Return the ranges that hold for all unit keys, scaled queries and beta up to ``max_beta``."""
    bounds = {step.output: step.bound for step in program.steps if step.bound is not None}
    return {BETA: max_beta, LOG_DECAY: MAX_LOG_DECAY, **bounds}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepGrids:
    """A quantization of every tensor, and what it follows from."""

    tensors: Mapping[str, Quantization]
    ranges: Mapping[str, float]
    requantize: Requantize


def step_grids(
    program: Program,
    observed: Observed,
    widths: Widths,
    formats: Mapping[str, IntFormat],
    *,
    channels: ValueChannels | None,
    room: RoomRules,
    scales: ScaleRule,
    requantize: Requantize,
    max_beta: float,
    clipped: Mapping[str, float] | None = None,
) -> StepGrids:
    """Choose every scale of a chunk step.

    Parameters
    ----------
    program : Program
    observed : Observed
    widths : Widths
        Groups of the program.
    formats : mapping
        Format of every tensor.
    channels : ValueChannels, optional
        What happens to values before their grid.
    room : RoomRules
    scales : ScaleRule
    requantize : Requantize
        What the target wants; ``divide`` is taken where residual terms or two planes ask for it.
    max_beta : float
        Largest beta that ranges are proved for.
    clipped : mapping, optional
        Smaller ranges for some tensors, beyond which values saturate.
    """
    seen, proved = seen_ranges(program, observed, channels), proved_ranges(program, max_beta)
    ranges = {}
    for group, members in widths.groups.items():
        for name in members:
            factor = room.of(group, formats[name]) if group in widths.value_groups else 1.0
            ranges[name] = _range(seen[name] * factor, proved.get(name, math.inf))
    ranges |= dict.fromkeys(_decays(program, widths), 1.0)
    ranges |= dict.fromkeys(widths.groups[LOG_DECAY], _log_range(seen, widths, formats))
    ranges |= {name: min(limit, ranges[name]) for name, limit in (clipped or {}).items()}
    states = carried_tensors(program)
    ranges |= dict.fromkeys(states, max(ranges[name] for name in states))
    divides = any(fmt.planes > 1 for fmt in formats.values()) or bool(residual_partners(program))
    form = Requantize.DIVIDE if divides else requantize
    tensors = choose_quantizations(program, ranges, formats, scales, form)
    if scales is ScaleRule.FLOAT:
        tensors |= _safe_logs(program, widths, tensors)
    return StepGrids(tensors=tensors, ranges=ranges, requantize=form)


def _decays(program: Program, widths: Widths) -> list[str]:
    """Return the tensors that follow from log decays alone.

    They reach 1 whatever the data showed: the last chunk of a sequence may hold one token.
    """
    apart = {*beyond_decays(program), *widths.groups[LOG_DECAY]}
    return [name for name in program.tensors if name not in apart]


def _safe_logs(
    program: Program, widths: Widths, tensors: Mapping[str, Quantization]
) -> dict[str, Quantization]:
    """Return grids of all log decays on which no library's exp decides a rounding to 8 bits.

    They stay on one scale: then their sums are sums of integers.
    """
    logs = {name: tensors[name] for name in widths.groups[LOG_DECAY]}
    narrow = {
        (tensors[step.output].format, tensors[step.output].scale)
        for step in program.steps
        if isinstance(step, Exponential) and tensors[step.output].format.largest <= INT8.largest
    }
    fmt, scale = logs[LOG_DECAY].format, max(grid.scale for grid in logs.values())
    for result, step in sorted(narrow, key=lambda grid: grid[1]):
        scale = safe_scale(scale, fmt, step, result)
    return {name: replace(grid, scale=scale) for name, grid in logs.items()}


def _range(wanted: float, proved: float) -> float:
    """A proved range where it costs little, else what the data showed, which it never exceeds."""
    return proved if proved <= PROVED_SHARE * wanted else min(wanted, proved)


def _log_range(seen: Mapping[str, float], widths: Widths, formats: Mapping[str, IntFormat]) -> float:
    if formats[LOG_DECAY].largest > INT8.largest:
        return MAX_LOG_DECAY
    return min(NARROW_LOG_DECAY, max(seen[name] for name in widths.groups[LOG_DECAY]))
