"""Cost against sqnr of the programs that a planner compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qinvert.calibration.planning.verdicts import Outcome, Verdict, verdicts
from qinvert.plan.plan import LayerPlan
from qinvert.plot.canvas import BAD, FIRST, FOURTH, INK, MUTED, SECOND, TEXT, axes, grid, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Decibels below the chosen candidate at which the figure ends; others lie on its lower edge.
DEPTH: Final = 25.0
#: Marker and colour of every outcome that has an sqnr.
MARKERS: Final = {
    Outcome.CHOSEN: ("*", FIRST, 150),
    Outcome.COSTLIER: ("o", MUTED, 30),
    Outcome.ALIKE: ("o", INK, 30),
    Outcome.FAR_FROM_FLOOR: ("s", FOURTH, 28),
    Outcome.BELOW_GOAL: ("v", BAD, 34),
    Outcome.REFUSED: ("X", SECOND, 34),
}


def cost_against_sqnr(
    plan: LayerPlan,
    goal_db: float | None = None,
    *,
    max_loss_db: float | None = None,
    unit: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Every candidate of a layer by its cost and its sqnr, marked by why it was chosen or not.

    Parameters
    ----------
    plan : LayerPlan
        As `qinvert.calibrate` returns it; its provenance has the candidates.
    goal_db, max_loss_db : float, optional
        Goals of the plan, which decide why a candidate was not chosen.
    unit : str
        Unit of costs.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes(ax, 3.3)
    known = [v for v in verdicts(plan, goal_db, max_loss_db) if v.sqnr_db is not None and v.cost is not None]
    top = max((v.sqnr_db for v in known if v.sqnr_db is not None and v.sqnr_db < 1e3), default=0.0)
    for outcome, (marker, colour, size) in MARKERS.items():
        points = [_point(v, top) for v in known if v.outcome is outcome]
        if points:
            costs, decibels = zip(*points, strict=True)
            order = 3 if outcome is Outcome.CHOSEN else 2
            ax.scatter(costs, decibels, size, colour, marker=marker, label=str(outcome), zorder=order)
    if goal_db is not None and goal_db >= top - DEPTH:
        ax.axhline(goal_db, color=MUTED, linestyle="--", linewidth=1, label=f"goal, {goal_db:g} dB")
    what = "T" if plan.program.is_inverse else "output or state"
    ax.set(xscale="log", xlabel=f"cost, {unit}" if unit else "cost", ylabel=f"sqnr of {what}, dB")
    ax.tick_params(axis="x", which="minor", labelsize=TEXT - 1.5, colors=INK)
    grid(ax)
    legend(ax)
    return ax


def _point(verdict: Verdict, top: float) -> tuple[float, float]:
    assert verdict.cost is not None
    assert verdict.sqnr_db is not None
    return verdict.cost, min(max(verdict.sqnr_db, top - DEPTH), top)
