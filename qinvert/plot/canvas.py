"""What all figures share: colours, sizes, and the Axes they are drawn on."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from qinvert.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colours of lines and texts by their roles; the page replaces each of them by one that fits a dark screen.
INK: Final = "#1b1f24"
MUTED: Final = "#545d69"
GRID: Final = "#d5dae1"
FIRST: Final = "#1f6feb"
SECOND: Final = "#b8430a"
THIRD: Final = "#13795b"
FOURTH: Final = "#8a3ffc"
BAD: Final = "#c21b2f"
#: Colours of series, in order.
SERIES: Final = (FIRST, SECOND, THIRD, FOURTH)
#: Colours of texts on cells that have a colour of their own.
ON_LIGHT: Final = "#0b0c0e"
ON_DARK: Final = "#fdfdfd"
#: Colours from the least to the most; readable with every kind of colour vision.
SCALE: Final = "cividis"
#: Width of a figure, inches.
WIDTH: Final = 4.4
#: Size of texts, points.
TEXT: Final = 8.5
#: Letters that the longest names of two columns may have together.
LONG: Final = 54


def require_matplotlib() -> Any:
    """Import ``matplotlib.figure``, or raise an error that says how to install it."""
    try:
        return import_module("matplotlib.figure")
    except ImportError:
        raise MissingDependencyError(
            "figures need matplotlib, which is not installed; run: pip install 'qinvert[report]'"
        ) from None


def axes(ax: Axes | None, height: float, width: float = WIDTH) -> Axes:
    """Return ``ax`` with the colours of all figures, or that of a new figure of this size in inches."""
    if ax is None:
        figure = require_matplotlib().Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_visible(False)
        ax = figure.add_subplot()
    assert ax is not None
    ax.patch.set_visible(False)
    for name, spine in ax.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(MUTED)
    ax.tick_params(colors=INK, labelsize=TEXT, length=3)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set(color=INK, fontsize=TEXT)
    ax.set_axisbelow(True)
    return ax


def grid(ax: Axes, axis: str = "both") -> None:
    """Draw lines behind the figure."""
    ax.grid(visible=True, axis=axis, color=GRID, linewidth=0.6)  # type: ignore[arg-type]


def legend(ax: Axes) -> None:
    """Put the names of series below the figure, where they cover nothing, in two columns if these fit."""
    handles, names = ax.get_legend_handles_labels()
    half = (len(names) + 1) // 2
    ax.figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=2 if _letters(names[:half]) + _letters(names[half:]) <= LONG else 1,
        frameon=False,
        fontsize=TEXT,
        labelcolor=INK,
    )


def _letters(names: Sequence[str]) -> int:
    return max(map(len, names), default=0)


def shortened(name: str, limit: int = 34) -> str:
    """Return a name of at most ``limit`` characters: its end, which tells layers apart."""
    return name if len(name) <= limit else f"...{name[3 - limit :]}"
