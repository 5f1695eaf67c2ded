"""What a layer's program reaches with 4, 8, 8x2 and 16 bits: predicted, and on seen and unseen matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qinvert.calibration.width_survey import WidthRow
from qinvert.plot.canvas import FIRST, FOURTH, MUTED, SECOND, THIRD, axes, grid, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Field of a row, its name, colour and marker.
LINES = (
    ("floor_db", "floor of the grids", MUTED, "_"),
    ("predicted_sqnr_db", "predicted", FOURTH, "x"),
    ("seen_sqnr_db", "seen matrices", FIRST, "o"),
    ("unseen_sqnr_db", "unseen matrices", SECOND, "D"),
)


def error_against_bits(
    rows: Sequence[WidthRow], goal_db: float | None = None, *, ax: Axes | None = None
) -> Axes:
    """Sqnr of T by the format of every tensor, as predicted and as simulated.

    Parameters
    ----------
    rows : sequence of WidthRow
        Of `qinvert.calibration.width_survey.width_survey`.
    goal_db : float, optional
        Goal of the plan.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes(ax, 3.0)
    for field, label, colour, marker in LINES:
        values = [getattr(row, field) for row in rows]
        shown = [value if math.isfinite(value) and abs(value) < 1e3 else math.nan for value in values]
        ax.plot(
            range(len(rows)), shown, marker=marker, color=colour, label=label, linewidth=1.2, markersize=5
        )
    if goal_db is not None:
        ax.axhline(goal_db, color=THIRD, linestyle="--", linewidth=1, label=f"goal, {goal_db:g} dB")
    ax.set_xticks(range(len(rows)), [row.bits for row in rows])
    ax.set_xlim(-0.3, len(rows) - 0.7)
    ax.set(xlabel="bits of every tensor", ylabel="sqnr of T, dB")
    grid(ax, "y")
    legend(ax)
    return ax
