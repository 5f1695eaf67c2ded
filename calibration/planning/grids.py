"""From ranges to grids: the room that unseen data needs, and one quantization for every tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from qinvert.calibration.planning.clipping import RangeRule, clip_ranges
from qinvert.calibration.planning.rounding_noise import settle_residues
from qinvert.calibration.planning.scales import (
    ScaleRule,
    allows_multiplier,
    choose_quantizations,
    hold_partial_products,
)
from qinvert.formats import INT8, IntFormat
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.program import Program
from qinvert.program.steps import MatMul, Scale
from qinvert.systems import Systems

#: Room above what calibration saw, for tensors without a proved range.
HEADROOM: Final = 2.0

#: Room above what calibration saw for all tensors of 16 bits: there one saturated value
#: costs more than the steps that are given away.
WIDE_ROOM: Final = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class GridRules:
    """How ranges become grids."""

    #: Which scales are legal.
    scales: ScaleRule
    #: What range a grid covers.
    ranges: RangeRule
    #: Requantize form that the target wants where the program allows it.
    requantize: Requantize
    #: Whether kernels of the target may fold zero points of sums, see `qinvert.plan.far_sums`.
    folds: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Grids:
    """A quantization of every tensor, and what it follows from."""

    tensors: Mapping[str, Quantization]
    #: Range of every tensor, with room for unseen data.
    ranges: Mapping[str, float]
    requantize: Requantize


def choose_grids(
    program: Program,
    ranges: Mapping[str, float],
    sample: Systems,
    formats: Mapping[str, IntFormat],
    rules: GridRules,
) -> Grids:
    """Choose every scale of ``program`` under the given formats.

    Parameters
    ----------
    program : Program
    ranges : mapping
        max|x| per tensor that calibration saw.
    sample : Systems
        Flat systems, with beta where the program takes it.
    formats : mapping
        Format of every tensor, the same for tensors that share a grid.
    rules : GridRules
    """
    room = {
        name: r * (WIDE_ROOM if _is_wide(formats[name]) else 1.0)
        for name, r in widened(program, ranges).items()
    }
    clipped = clip_ranges(program, room, sample, formats, rules.ranges)
    settled = settle_residues(program, clipped, sample, formats)
    requantize = rules.requantize
    if requantize is Requantize.MULTIPLIER:
        roomy = hold_partial_products(program, settled, formats)
        if allows_multiplier(program, roomy, formats, rules.scales):
            settled = roomy
        else:
            requantize = Requantize.DIVIDE
    tensors = choose_quantizations(program, settled, formats, rules.scales, requantize)
    return Grids(tensors=tensors, ranges=settled, requantize=requantize)


def _is_wide(fmt: IntFormat) -> bool:
    return fmt.planes * fmt.container_bits > INT8.container_bits


def unproved(program: Program) -> list[str]:
    """Return the tensors whose range rests on what was seen: powers, partial sums, residues."""
    proved = {step.output for step in program.steps if step.bound is not None}
    ends = {port.tensor for port in (*program.inputs, *program.outputs)}
    return [name for name in program.tensors if name not in proved | ends | program.partial_tensors]


def growth(program: Program, ranges: Mapping[str, float]) -> float:
    """Return the largest tensor without a proved range, over the larger of max|M| and max|output|."""
    ports = program.inverse_ports
    scale = max(ranges[ports.matrix], ranges[ports.result])
    largest = max((ranges[name] for name in unproved(program)), default=0.0)
    if scale == 0 or largest == 0:
        return 0.0
    return largest / scale if math.isfinite(scale) else math.inf


def widened(program: Program, ranges: Mapping[str, float]) -> dict[str, float]:
    """Return ``ranges`` with room for what unseen data may hold; a partial tensor has that of its readers."""
    # A tensor under the input's bound can hold the input's largest entry, wherever that
    # falls in unseen data: a merge that saw smaller blocks only must not saturate on it.
    # A tensor without a bound can exceed what was seen.  Powers can do so by any factor.
    # Partial sums hold M, so that room beyond M and T would only make them coarser.
    # Vectors are inputs: all of their values were seen, and scaled entries have them as a factor.
    ports = program.inverse_ports
    source = ranges[ports.matrix]
    free, scale = unproved(program), max(source, ranges[ports.result])
    floors = dict.fromkeys(program.vector_inputs, 0.0)
    floors |= {s.output: source * ranges[s.vector] for s in program.steps if isinstance(s, Scale)}
    powers = {s.output for s in program.steps if isinstance(s, MatMul) and not s.add and not s.subtract}
    caps = {name: HEADROOM * scale if name in powers else scale for name in free}
    room = {
        name: max(r, min(HEADROOM * r, caps[name])) if name in caps else max(r, floors.get(name, source))
        for name, r in ranges.items()
    }
    return _of_readers(program, room)


def _of_readers(program: Program, ranges: Mapping[str, float]) -> dict[str, float]:
    """Return ``ranges`` with what the steps that read a partial tensor need in place of its own range."""
    needed, partial = dict(ranges), program.partial_tensors
    # The last step comes first, because a partial tensor may be read by another one.
    for step in reversed(program.steps):
        if step.output in partial:
            readers = [needed[reader.output] for reader in program.steps if step.output in reader.inputs]
            needed[step.output] = max(readers, default=needed[step.output])
    return needed
