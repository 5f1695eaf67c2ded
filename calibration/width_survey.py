"""One program under every width: predicted, and simulated on seen and unseen matrices."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qinvert.calibration.calibrate import calibrate
from qinvert.calibration.simulate import simulate
from qinvert.calibration.sources import DEFAULT_LAYER
from qinvert.cautions import QInvertWarning
from qinvert.errors import QInvertError
from qinvert.program.program import Program
from qinvert.systems import Systems

#: ``bits`` of `qinvert.calibrate`, from the coarsest grid to the finest.
WIDTHS: Final = (4, 8, "8x2", 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthRow:
    """One program with one format for every tensor; all numbers are decibels."""

    #: Bits, as `qinvert.calibrate` takes them.
    bits: str
    #: By the planner, from the noise of each grid.
    predicted_sqnr_db: float
    #: By simulation on the half that the grids were chosen on.
    seen_sqnr_db: float
    #: By simulation on the other half.
    unseen_sqnr_db: float
    #: Of the exact inverse on the same grids, on the other half.
    floor_db: float


def width_survey(program: Program, systems: Systems, widths: Sequence[int | str] = WIDTHS) -> list[WidthRow]:
    """Calibrate a program on every second matrix under each width, and simulate it on both halves.

    Parameters
    ----------
    program : Program
        Program of an inverse.
    systems : Systems
        At least two matrices ``[N, C, C]``, with beta where the program takes it.
    widths : sequence
        As ``bits`` of `qinvert.calibrate`; those that the program cannot have are left out.
    """
    seen, unseen = systems[::2], systems[1::2]
    found = []
    for bits in widths:
        try:
            found.append(_row(program, seen, unseen, bits))
        except QInvertError:
            # Some programs lack a target of that width; the others are what was asked for.
            continue
    return found


def _row(program: Program, seen: Systems, unseen: Systems, bits: int | str) -> WidthRow:
    factored = program.inverse_ports.factored
    halves = [{DEFAULT_LAYER: (s.lower, s.beta) if factored else s.lower} for s in (seen, unseen)]
    with warnings.catch_warnings():
        # Nothing is asked of these plans.
        warnings.simplefilter("ignore", QInvertWarning)
        plan = calibrate(halves[0], method=program, bits=bits, factored=factored)
    first, second = (simulate(plan, half).layers[DEFAULT_LAYER] for half in halves)
    return WidthRow(
        bits=str(bits),
        predicted_sqnr_db=plan.layer().provenance["predicted_sqnr_db"],
        seen_sqnr_db=first.sqnr_db,
        unseen_sqnr_db=second.sqnr_db,
        floor_db=second.floor_db,
    )
