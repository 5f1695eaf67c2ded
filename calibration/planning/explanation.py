"""Says in a plan's provenance why it is as it is, and what would change it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from qinvert.calibration.observation.held_out import HeldOut
from qinvert.calibration.planning.candidates import measure
from qinvert.calibration.planning.planner import Candidate, Choice, Prediction, finite
from qinvert.calibration.planning.sensitivity import TRUNCATION
from qinvert.formats import INT8, INT8X2, INT16, IntFormat
from qinvert.profiles import default_target

#: Digits of decibels behind the point: equal data give equal plans, with any number of threads.
DIGITS: Final = 6


def explain(choice: Choice, alternatives: Sequence[Candidate], held: HeldOut | None = None) -> dict[str, Any]:
    """Return what is known of a choice, as JSON types.

    Parameters
    ----------
    choice : Choice
    alternatives : sequence of Candidate
        The same program on wider formats, to name the change that would fix a miss.
    held : HeldOut, optional
        Matrices on which these are simulated, so that advice does not rest on predictions.
    """
    best = choice.best
    sqnr_db, floor_db = best.best_known
    tensor, share = best.binding
    return {
        "meets_goal": choice.meets_goal,
        "expected_sqnr_db": decibels(sqnr_db),
        "expected_floor_db": decibels(floor_db),
        "predicted_sqnr_db": decibels(best.sqnr_db),
        "growth": finite(best.candidate.growth),
        "cost": round(best.cost),
        **_compiled(best),
        "binding": {"tensor": tensor, "share": rounded_share(share)},
        "fix": "" if choice.meets_goal else _fix(choice, alternatives, held),
        "candidates": [_row(p, p is best) for p in choice.predictions],
        "rejected": [
            *choice.passed_over,
            *(p.reason(choice.goals) for p in choice.predictions if _lost(p, choice)),
        ],
    }


def _lost(prediction: Prediction, choice: Choice) -> bool:
    cheaper = prediction.cost <= choice.best.cost or not choice.meets_goal
    return cheaper and prediction.candidate is not choice.best.candidate


def _row(prediction: Prediction, chosen: bool) -> dict[str, Any]:
    return {
        "program": prediction.plan.program.title,
        "formats": prediction.plan.formats,
        "cost": round(prediction.cost),
        **_compiled(prediction),
        "predicted_sqnr_db": decibels(prediction.sqnr_db),
        "predicted_floor_db": decibels(prediction.floor_db),
        "simulated_sqnr_db": decibels(prediction.simulated[0]) if prediction.simulated else None,
        "chosen": chosen,
    }


def _compiled(prediction: Prediction) -> dict[str, Any]:
    """What the compiler says of a candidate, if it was asked; None is a refusal."""
    if prediction.compiled is None:
        return {}
    cost = prediction.compiled.cost
    return {"compiled_cost": round(cost) if math.isfinite(cost) else None}


def decibels(value: float) -> float:
    """Return decibels as plans hold them."""
    # The number of threads decides the order of float64 sums, and with it the last digits.
    return round(finite(value), DIGITS)


def rounded_share(value: float) -> float:
    """Return a share as plans hold it."""
    return round(max(0.0, finite(value)), 4)


def _fix(choice: Choice, alternatives: Sequence[Candidate], held: HeldOut | None) -> str:
    tensor, share = choice.best.binding
    reason = (
        "the series is cut off too early"
        if tensor == TRUNCATION
        else f"{share:.0%} of the noise comes from {tensor!r}"
    )
    reached = []
    for candidate in alternatives:
        (fmt,) = candidate.ladder
        found = _reached(candidate, fmt, held)
        reached.append(found)
        if found >= choice.goals.min_sqnr_db:
            return f"{reason}; {_argument(fmt)} should reach {found:.0f} dB"
    best = max([choice.best.best_known[0], *reached])
    return f"{reason}; no format of more bits helps, lower min_sqnr_db to {best:.0f}"


def _reached(candidate: Candidate, fmt: IntFormat, held: HeldOut | None) -> float:
    """Sqnr of the candidate with one format everywhere: by simulation where there are matrices for it."""
    if held is None:
        return candidate.sensitivities.sqnr_db(candidate.uniform(fmt))
    plan = candidate.plan(candidate.uniform(fmt))
    return measure(plan, held.systems, held.systems.inverse())[0].sqnr_db


def _argument(fmt: IntFormat) -> str:
    bits = {INT8.name: "8", INT8X2.name: "'8x2'", INT16.name: "16"}[fmt.name]
    return f"bits={bits}, target={default_target(fmt)!r}"
