"""Errors of every layer and head as a map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qinvert.calibration.head_errors import HeadErrors
from qinvert.plot.canvas import INK, MUTED, ON_DARK, ON_LIGHT, SCALE, TEXT, axes, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def head_errors(
    heads: Mapping[str, Sequence[HeadErrors]], what: str = "T", *, ax: Axes | None = None
) -> Axes:
    """Sqnr by layer and head; hatched cells are heads without a share of their layer's signal.

    Parameters
    ----------
    heads : mapping
        By layer; see `qinvert.LayerReport.heads`.
    what : str
        What the sqnr is of: T, or the output of a chunk step.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    number = max(head.head for each in heads.values() for head in each) + 1
    ax = axes(ax, 1.3 + 0.36 * len(heads))
    known = [h.sqnr_db for each in heads.values() for h in each if math.isfinite(h.sqnr_db)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    image = ax.imshow(
        [_row(each, number) for each in heads.values()],
        cmap=SCALE, aspect="auto", vmin=low - 1, vmax=high + 1, interpolation="nearest",
    )  # fmt: skip
    for row, each in enumerate(heads.values()):
        for head in each:
            _cell(ax, row, head, (low + high) / 2, written=number <= 16)
    ax.set_yticks(range(len(heads)), [shortened(name, 26) for name in heads], fontsize=TEXT)
    step = max(1, number // 16)
    ax.set_xticks(range(0, number, step))
    ax.set_xlabel("head")
    bar = ax.figure.colorbar(image, ax=ax, location="bottom", aspect=40, pad=0.02)
    bar.set_label(f"sqnr of {what}, dB", color=INK, fontsize=TEXT)
    bar.ax.tick_params(colors=INK, labelsize=TEXT)
    bar.outline.set_visible(False)
    return ax


def _row(heads: Sequence[HeadErrors], number: int) -> list[float]:
    found = dict.fromkeys(range(number), math.nan)
    return list(
        (found | {h.head: h.sqnr_db if math.isfinite(h.sqnr_db) else math.nan for h in heads}).values()
    )


def _cell(ax: Axes, row: int, head: HeadErrors, middle: float, *, written: bool) -> None:
    from matplotlib.patches import Rectangle

    finite = math.isfinite(head.sqnr_db)
    if not head.carries_signal:
        ax.add_patch(
            Rectangle(
                (head.head - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor=MUTED, linewidth=0
            )
        )
    if written:
        text = f"{head.sqnr_db:.0f}" if finite else "exact" if head.sqnr_db > 0 else "none"
        colour = INK if not finite else ON_LIGHT if head.sqnr_db > middle else ON_DARK
        ax.text(head.head, row, text, ha="center", va="center", fontsize=TEXT, color=colour)
