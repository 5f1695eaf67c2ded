"""One choice of widths, value channels and ranges of a layer, with what it reaches and costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from qinvert.calibration.choices import RangeRule, ScaleRule
from qinvert.calibration.chunk_steps.grids import (
    RoomRules,
    StepGrids,
    proved_ranges,
    seen_ranges,
    step_grids,
)
from qinvert.calibration.chunk_steps.magnitudes import Magnitudes
from qinvert.calibration.chunk_steps.observation import Observed
from qinvert.calibration.chunk_steps.widths import Widths
from qinvert.calibration.planning.clipping import clip_range
from qinvert.chunk_step.ports import READ_STATE, STATE
from qinvert.delta_rule.chunks import ChunkOutputs, DeltaChunks
from qinvert.execution.chunk_steps import run_integers
from qinvert.formats import IntFormat
from qinvert.matrices import SolvedInverse
from qinvert.metrics import NoiseStatistics
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Requantize
from qinvert.plan.value_channels import ValueChannels
from qinvert.program.program import Program


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRules:
    """How the grids of a step are chosen, the same for all candidates of a layer."""

    narrow: IntFormat
    #: None where the target has no format of more than 8 bits.
    wide: IntFormat | None
    #: Whether all that an elementwise operator reads and writes must have one width.
    equal_widths: bool
    scales: ScaleRule
    requantize: Requantize
    room: RoomRules


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """What the planner knows of one layer."""

    program: Program
    observed: Observed
    widths: Widths
    rules: StepRules
    #: Largest beta that ranges are proved for.
    max_beta: float
    #: Outputs and states of the sample in floating point.
    truth: ChunkOutputs

    @property
    def sample(self) -> DeltaChunks:
        """Chunks that candidates are simulated on."""
        assert self.observed.sample is not None
        return self.observed.sample

    @cached_property
    def magnitudes(self) -> Magnitudes:
        """Magnitudes of the tensors that may be clipped, on the sample.

        The state keeps its range, and so does what is read of it: what saturates there is missing in every
        later chunk.
        """
        groups = [g for g in self.widths.value_groups if g not in (STATE, READ_STATE)]
        names = [name for group in groups for name in self.widths.groups[group]]
        return Magnitudes(self.program, names, self.sample)


class Scaling(NamedTuple):
    """What happens to value channels, and how reasons name it."""

    name: str
    channels: ValueChannels | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a plan reaches on the sample, the state carried by the integers."""

    #: Sqnr of the outputs.
    sqnr_o_db: float
    #: Sqnr of the last states.
    sqnr_state_db: float
    #: Noise of every value channel relative to its own signal, on the mean over channels, of both:
    #: what follows a layer weighs channels alike, and one large channel would hide all others.
    channel_noise: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """A plan, and what it reaches on the sample."""

    plan: LayerPlan
    #: Groups that have more than 8 bits.
    widened: tuple[str, ...]
    scaling: Scaling
    ranges: RangeRule
    measured: Measured
    cost: float

    @property
    def sqnr_o_db(self) -> float:
        """Sqnr of the output."""
        return self.measured.sqnr_o_db

    @property
    def sqnr_state_db(self) -> float:
        """Sqnr of the last state."""
        return self.measured.sqnr_state_db

    @property
    def sqnr_db(self) -> float:
        """The smaller one of output and state."""
        return min(self.sqnr_o_db, self.sqnr_state_db)

    @property
    def noise(self) -> float:
        """Sum of both relative powers of noise."""
        return sum(10 ** (-db / 10) for db in (self.sqnr_o_db, self.sqnr_state_db))

    @property
    def whole_cost(self) -> int:
        """The cost as a plan holds it."""
        return round(self.cost)

    def to_json(self, chosen: bool) -> dict[str, Any]:
        """Return a row of the table of candidates."""
        return {
            "program": self.plan.program.title,
            "formats": self.plan.formats,
            "widened": list(self.widened),
            "channels": self.scaling.name,
            "ranges": str(self.ranges),
            "cost": self.whole_cost,
            "sqnr_o_db": finite_db(self.sqnr_o_db),
            "sqnr_state_db": finite_db(self.sqnr_state_db),
            "chosen": chosen,
        }


def exact_outputs(chunks: DeltaChunks) -> ChunkOutputs:
    """Outputs and state with the exact inverse, in float32."""
    return chunks.apply(SolvedInverse(chunks.lower))


def plan_layer(
    layer: Layer, widened: tuple[str, ...], channels: ValueChannels | None, ranges: RangeRule
) -> LayerPlan:
    """Return the plan with these groups wide."""
    rules = layer.rules
    formats = layer.widths.formats(
        rules.narrow,
        rules.wide or rules.narrow,
        widened,
        equal_widths=rules.equal_widths,
        float_state=rules.room.float_state,
    )
    grids = _grids(layer, formats, channels, None)
    if ranges is not RangeRule.MAX:
        clipped = _clipped(layer, formats, channels, grids, ranges)
        grids = _grids(layer, formats, channels, clipped)
    return LayerPlan(
        program=layer.program,
        tensors=grids.tensors,
        requantize=grids.requantize,
        ranges={name: limit if math.isfinite(limit) else 3.4e38 for name, limit in grids.ranges.items()},
        channels=None if channels is None or channels.changes_nothing else channels,
    )


def _grids(
    layer: Layer,
    formats: Mapping[str, IntFormat],
    channels: ValueChannels | None,
    clipped: Mapping[str, float] | None,
) -> StepGrids:
    return step_grids(
        layer.program,
        layer.observed,
        layer.widths,
        formats,
        channels=channels,
        room=layer.rules.room,
        scales=layer.rules.scales,
        requantize=layer.rules.requantize,
        max_beta=layer.max_beta,
        clipped=clipped,
    )


def _clipped(
    layer: Layer,
    formats: Mapping[str, IntFormat],
    channels: ValueChannels | None,
    grids: StepGrids,
    rule: RangeRule,
) -> dict[str, float]:
    """Return smaller ranges for the narrow tensors of values, chosen on the sample."""
    return {
        name: clip_range(magnitudes, grids.ranges[name], formats[name], rule)
        for name, magnitudes in layer.magnitudes.of(channels).items()
        if formats[name].largest <= layer.rules.narrow.largest
    }


def measure(layer: Layer, plan: LayerPlan) -> Measured:
    """Return what a plan reaches on the sample, free-running."""
    result = run_integers(plan, layer.sample, plan.channels)
    found, channels = [], 0.0
    for name in ("out", "state"):
        estimate, exact = getattr(result, name), getattr(layer.truth, name)
        statistics = NoiseStatistics()
        statistics.update(estimate, exact)
        found.append(statistics.sqnr_db)
        channels += _channel_noise(estimate, exact)
    return Measured(sqnr_o_db=found[0], sqnr_state_db=found[1], channel_noise=channels)


def _channel_noise(estimate: torch.Tensor, exact: torch.Tensor) -> float:
    """Noise of every head and value channel over its own signal, at most 1, on the mean."""
    axes = [axis for axis in range(exact.ndim) if axis not in (1, exact.ndim - 1)]
    wide = exact.to(torch.float64)
    signal, noise = (x.square().sum(axes) for x in (wide, estimate.to(torch.float64) - wide))
    share = torch.where(noise > 0, noise / signal.clamp(min=1e-300), 0.0)
    return float(share.nan_to_num(nan=1.0).clamp(max=1.0).mean())


def margins(layer: Layer, plan: LayerPlan) -> dict[str, float]:
    """Return how far the grids of every group of values reach, times what the data showed, at the least."""
    seen = seen_ranges(layer.program, layer.observed, plan.channels)
    proved = proved_ranges(layer.program, layer.max_beta)
    found = {}
    for group in layer.widths.value_groups:
        names = [name for name in layer.widths.groups[group] if name not in proved and seen[name] > 0]
        if names:
            found[group] = float(f"{min(plan.tensors[name].limit / seen[name] for name in names):.4g}")
    return found


def with_provenance(plan: LayerPlan, provenance: Mapping[str, Any]) -> LayerPlan:
    """Return the plan with what is known of it."""
    return replace(plan, provenance=dict(provenance))


def finite_db(value: float) -> float:
    """Return decibels that JSON can hold: equal data give equal digits, with any number of threads."""
    return round(min(max(value, -400.0), 400.0), 6)
