"""Why each candidate of a plan was chosen or not, in words, from what the plan itself holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from qinvert.calibration.planning.reasons import ALIKE, GROWS, floor_reason, lack_reason
from qinvert.plan.plan import LayerPlan
from qinvert.strict_json import INFINITE


class Outcome(StrEnum):
    """Why a candidate was chosen or not."""

    #: The plan's own program.
    CHOSEN = "chosen"
    #: It reaches the goals and costs more.
    COSTLIER = "costs more"
    #: It reaches the goals at the same cost.
    ALIKE = "no better than the chosen one"
    #: It loses more against its own grids than the plan's goal allows.
    FAR_FROM_FLOOR = "too far below its floor"
    #: It stays below the goal.
    BELOW_GOAL = "below the goal"
    #: The target's compiler does not take it.
    REFUSED = "refused by the compiler"
    #: Its powers outgrow the inverse, so that it was not predicted.
    GROWS = "its powers grow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One candidate of one layer."""

    #: Title of the program, with what was made wide in a chunk step.
    program: str
    formats: str
    outcome: Outcome
    #: One sentence for people.
    reason: str
    #: In the unit of the plan's costs; None if it was not predicted.
    cost: float | None = None
    #: Simulated if possible, else predicted; None if it was not predicted.
    sqnr_db: float | None = None
    #: Whether `sqnr_db` was simulated.
    simulated: bool = False


def verdicts(
    plan: LayerPlan, goal_db: float | None = None, max_loss_db: float | None = None
) -> list[Verdict]:
    """Return every candidate that the plan of a layer remembers, in the plan's order.

    Parameters
    ----------
    plan : LayerPlan
        A plan that was not calibrated has no candidates.
    goal_db : float, optional
        Smallest sqnr that was asked for; None if none was.
    max_loss_db : float, optional
        Largest distance to the floor that was asked for.
    """
    rows = plan.provenance.get("candidates")
    if not isinstance(rows, (list, tuple)):
        return []
    rows = [row for row in rows if isinstance(row, Mapping)]
    best = next((_cost(row) for row in rows if row.get("chosen")), None)
    rejected = [str(text) for text in plan.provenance.get("rejected", ())]
    found = [_verdict(row, best, goal_db, max_loss_db) for row in rows]
    return found + [_grown(*text.split(f": {GROWS}", 1)) for text in rejected if f": {GROWS}" in text]


def _grown(title: str, rest: str) -> Verdict:
    return Verdict(program=title, formats="", outcome=Outcome.GROWS, reason=_sentence(f"{GROWS}{rest}"))


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _cost(row: Mapping[str, Any]) -> float | None:
    value = row.get("compiled_cost", row.get("cost"))
    return None if value is None else float(value)


def _verdict(
    row: Mapping[str, Any], best: float | None, goal_db: float | None, max_loss_db: float | None
) -> Verdict:
    sqnr_db, simulated = _sqnr(row)
    outcome, reason = _outcome(row, sqnr_db, best, goal_db, max_loss_db)
    wide = ", ".join(row.get("widened", ()))
    return Verdict(
        program=str(row.get("program", "")) + (f" with {wide} wide" if wide else ""),
        formats=str(row.get("formats", "")),
        outcome=outcome,
        reason=reason,
        cost=_cost(row),
        sqnr_db=sqnr_db,
        simulated=simulated,
    )


def _sqnr(row: Mapping[str, Any]) -> tuple[float | None, bool]:
    """Return the sqnr of a candidate, of a chunk step its worse one, and whether it was simulated."""
    if "sqnr_o_db" in row:
        return min(row["sqnr_o_db"], row["sqnr_state_db"]), True
    simulated = row.get("simulated_sqnr_db")
    return (row.get("predicted_sqnr_db"), False) if simulated is None else (simulated, True)


def _outcome(
    row: Mapping[str, Any],
    sqnr_db: float | None,
    best: float | None,
    goal_db: float | None,
    max_loss_db: float | None,
) -> tuple[Outcome, str]:
    cost, floor_db = _cost(row), row.get("predicted_floor_db")
    if row.get("chosen"):
        return Outcome.CHOSEN, "This is the plan's program."
    if cost is None:
        return Outcome.REFUSED, "The compiler of the target refuses its graph."
    if sqnr_db is not None and goal_db is not None and sqnr_db < goal_db:
        return Outcome.BELOW_GOAL, _sentence(lack_reason(sqnr_db, goal_db))
    loss = 0.0 if sqnr_db is None or floor_db is None or floor_db >= INFINITE else floor_db - sqnr_db
    if max_loss_db is not None and loss > max_loss_db:
        return Outcome.FAR_FROM_FLOOR, _sentence(floor_reason(loss, max_loss_db))
    if best is not None and cost > best:
        return Outcome.COSTLIER, f"It costs {cost / max(best, 1):.3g} times as much as the chosen one."
    return Outcome.ALIKE, _sentence(ALIKE)
