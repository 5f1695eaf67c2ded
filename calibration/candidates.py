"""The programs that ``method="auto"`` chooses from, and what is known of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from qinvert.calibration.residues import settle_residues
from qinvert.calibration.scales import ScaleRule, allows_multiplier, choose_quantizations
from qinvert.formats import IntFormat
from qinvert.matrices import solve
from qinvert.methods import block_merge
from qinvert.metrics import ErrorStatistics, floor_inverse
from qinvert.plan import LayerPlan, Requantize
from qinvert.program import Program
from qinvert.simulator import simulate_inverse
from qinvert.steps import INPUT, MatMul

#: Room above what calibration saw, for tensors without a proved range.
HEADROOM: Final = 2.0


def auto_programs(chunk: int) -> list[Program]:
    """Return the candidates, fewest steps first, corrected ones last."""
    bases = [base for base in (16, 8, 4, 2) if base <= chunk]
    return [block_merge(chunk, base, corrections=k) for k in (0, 1) for base in bases]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A planned program and how it did on the sample."""

    plan: LayerPlan
    #: sqnr of the simulated plan on the sample.
    sqnr_db: float
    #: sqnr of the exact inverse on the same grids.
    floor_db: float

    @property
    def loss_db(self) -> float:
        """What the algorithm loses against its floor."""
        return self.floor_db - self.sqnr_db if math.isfinite(self.floor_db) else 0.0

    def meets(self, min_sqnr_db: float, max_loss_db: float) -> bool:
        """Whether both goals are reached on the sample."""
        return self.sqnr_db >= min_sqnr_db and self.loss_db <= max_loss_db

    def __str__(self) -> str:
        return f"{self.plan.program.title}: sqnr {self.sqnr_db:.1f} dB, floor {self.floor_db:.1f} dB"


def plan_program(
    program: Program,
    ranges: Mapping[str, float],
    sample: torch.Tensor,
    fmt: IntFormat,
    rule: ScaleRule,
    requantize: Requantize,
) -> Candidate:
    """Choose every scale of ``program`` and measure it on the sample by real simulation."""
    if requantize is Requantize.MULTIPLIER and not allows_multiplier(program, ranges, fmt, rule):
        requantize = Requantize.DIVIDE
    settled = settle_residues(program, _widened(program, ranges), sample, fmt)
    tensors = choose_quantizations(program, settled, fmt, rule, requantize)
    plan = LayerPlan(program=program, tensors=tensors, requantize=requantize, ranges=settled)
    achieved, floor = measure(plan, sample)
    return Candidate(plan=plan, sqnr_db=achieved.sqnr_db, floor_db=floor.sqnr_db)


def unproved(program: Program) -> list[str]:
    """Return the tensors without a proved range: powers, partial sums, residues."""
    proved = {step.output for step in program.steps if step.bound is not None}
    return [name for name in program.tensors if name not in proved | {INPUT, program.output}]


def _widened(program: Program, ranges: Mapping[str, float]) -> dict[str, float]:
    # A tensor under the input's bound can hold the input's largest entry, wherever that
    # falls in unseen data: a merge that saw smaller blocks only must not saturate on it.
    # A tensor without a bound can exceed what was seen: powers by any factor, partial sums
    # hold M, so that room beyond M and T would only make them coarser.
    free, scale = unproved(program), max(ranges[INPUT], ranges[program.output])
    powers = {s.output for s in program.steps if isinstance(s, MatMul) and not s.add and not s.subtract}
    caps = {name: HEADROOM * scale if name in powers else scale for name in free}
    return {
        name: max(r, min(HEADROOM * r, caps[name])) if name in caps else max(r, ranges[INPUT])
        for name, r in ranges.items()
    }


def measure(plan: LayerPlan, lower: torch.Tensor) -> tuple[ErrorStatistics, ErrorStatistics]:
    """Return the errors of the simulated plan and of its floor on checked matrices."""
    truth = solve(lower)
    achieved, floor = ErrorStatistics(), ErrorStatistics()
    achieved.update(simulate_inverse(plan, lower), truth)
    floor.update(floor_inverse(plan, lower), truth)
    return achieved, floor
