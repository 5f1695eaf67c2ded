"""What was predicted, what the planner saw, and what later data show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from qinvert.calibration.figures_of_merit import Figures
from qinvert.plot.canvas import FIRST, FOURTH, MUTED, SECOND, TEXT, THIRD, axes, grid, legend, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Beyond these decibels a figure has no place: there was no noise, or no signal.
ENDS: Final = (-60.0, 200.0)


def drift(figures: Mapping[str, Figures], goal_db: float | None = None, *, ax: Axes | None = None) -> Axes:
    """Sqnr of every layer as predicted, on the sample, on held-out matrices, and on the data of a report.

    Parameters
    ----------
    figures : mapping
        By entry of the plan, see `qinvert.calibration.figures_of_merit.figures_of`.
    goal_db : float, optional
        Goal of the plan.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes(ax, 1.7 + 0.3 * len(figures))
    rows = range(len(figures))
    series = (
        ("floor of the grids", "floor_db", "|", MUTED),
        ("predicted", "predicted_db", "x", FOURTH),
        ("calibration sample", "sample_db", "o", FIRST),
        ("this report's data", "now_db", "D", SECOND),
    )
    for label, field, marker, colour in series:
        points = [(getattr(f, field), row) for row, f in enumerate(figures.values())]
        shown = [(x, row) for x, row in points if x is not None and ENDS[0] < x < ENDS[1]]
        if shown:
            decibels, places = zip(*shown, strict=True)
            ax.scatter(decibels, places, 36, colour, marker=marker, label=label, zorder=3)
    _held_out(ax, figures)
    if goal_db is not None:
        ax.axvline(goal_db, color=THIRD, linestyle="--", linewidth=1, label=f"goal, {goal_db:g} dB")
    ax.set_yticks(rows, [shortened(name, 26) for name in figures], fontsize=TEXT)
    ax.set_ylim(len(figures) - 0.5, -0.5)
    ax.set_xlabel("sqnr, dB")
    grid(ax, "x")
    legend(ax)
    return ax


def _held_out(ax: Axes, figures: Mapping[str, Figures]) -> None:
    label: str | None = "held out, 90 % within"
    for row, f in enumerate(figures.values()):
        if f.held_out_db is not None and ENDS[0] < f.held_out_db < ENDS[1]:
            low, high = f.held_out_low_db or f.held_out_db, f.held_out_high_db or f.held_out_db
            ax.plot([low, min(high, ENDS[1])], [row, row], color=THIRD, linewidth=2.5, alpha=0.55)
            ax.plot([f.held_out_db], [row], color=THIRD, marker="s", markersize=5, linestyle="", label=label)
            label = None
