"""A second sample of a layer's matrices, on which no grid and no program was chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from qinvert.calibration.observation.statistics import MatrixSample
from qinvert.systems import Systems

#: With fewer matrices than this beside the first sample, that sample is measured, too.
FEWEST: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """Matrices that a plan is measured on."""

    systems: Systems
    #: Head of every matrix, `qinvert.calibration.heads.NO_HEAD` where it is not known.
    heads: torch.Tensor
    #: Whether the planner saw none of them.
    apart: bool


def held_out(sample: MatrixSample, second: MatrixSample) -> HeldOut | None:
    """Return the matrices of ``second`` that are not in ``sample``; all where too few are left.

    Both samples were offered the same matrices: the first one with the keys that were drawn,
    the second one with ``1 - key`` and the head of every matrix.
    """
    keys, kept = second.drawn
    if not kept:
        return None
    taken, _ = sample.drawn
    fresh = ~torch.isin(1.0 - keys, taken)
    apart = int(fresh.sum()) >= FEWEST
    chosen = fresh if apart else torch.ones_like(fresh)
    lower, *beta, heads = (x[chosen.to(x.device)] for x in kept)
    return HeldOut(
        systems=Systems(lower=lower, beta=beta[0] if beta else None), heads=heads.long().cpu(), apart=apart
    )
