"""The values of one tensor beside its grid, and where in the matrix the errors of T are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qinvert.plan.quantization import Quantization
from qinvert.plot.canvas import BAD, FIRST, INK, MUTED, SCALE, TEXT, axes, grid, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Bins of a histogram.
BINS: Final = 61
#: Share of a figure that is left free beside the largest value or the end of the grid.
ROOM: Final = 1.08


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How often values occur, and how many of them the grid does not hold."""

    #: Ends of the bins, ascending, one more than `counts`.
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    #: Grid that rounds the values.
    grid: Quantization
    #: Values beyond the ends of the grid, which are clipped.
    clipped: int
    #: Values that round to the first or last integer of the grid, clipped ones included.
    saturated: int
    #: Values that round to the integer 0 and are not 0.
    vanished: int

    @property
    def values(self) -> int:
        """Number of values."""
        return sum(self.counts)


def histogram(values: Any, quantization: Quantization) -> Histogram:
    """Count values, such as those below the diagonal of M, in bins that reach beyond the grid's ends.

    Parameters
    ----------
    values : array
        Any shape; not empty.
    quantization : Quantization
        Grid of the values.
    """
    flat = np.asarray(values, dtype=np.float64).ravel()
    end = ROOM * max(float(np.abs(flat).max(initial=0.0)), quantization.limit)
    counts, edges = np.histogram(flat, bins=BINS, range=(-end, end))
    size, step = np.abs(flat), quantization.scale
    return Histogram(
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
        grid=quantization,
        clipped=int((size > quantization.limit + step / 2).sum()),
        saturated=int((size >= quantization.limit - step / 2).sum()),
        vanished=int(((size < step / 2) & (size > 0)).sum()),
    )


def value_histogram(found: Histogram, name: str = "value", *, ax: Axes | None = None) -> Axes:
    """Values by their size on a logarithmic scale of counts, with the ends of the grid.

    Parameters
    ----------
    found : Histogram
        Of `histogram`.
    name : str
        What the values are, such as ``M``.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes(ax, 2.6)
    middles = [(low + high) / 2 for low, high in zip(found.edges, found.edges[1:], strict=False)]
    limit = found.grid.limit
    inside = [abs(x) <= limit for x in middles]
    width = found.edges[1] - found.edges[0]
    ax.bar(middles, found.counts, width, color=[FIRST if kept else BAD for kept in inside])
    ax.set_yscale("log")
    # A bin of one value would have no height on a scale that starts at one.
    ax.set_ylim(bottom=0.5)
    for number, end in enumerate((-limit, limit)):
        ax.axvline(end, color=BAD, linewidth=1.2, linestyle="--",
                   label=None if number else f"end of the grid, {limit:.3g}")  # fmt: skip
    ax.axvspan(-found.grid.scale / 2, found.grid.scale / 2, color=MUTED, alpha=0.35, linewidth=0,
               label=f"rounds to 0, step {found.grid.scale:.3g}")  # fmt: skip
    ax.set(xlabel=name, ylabel="values")
    grid(ax, "y")
    legend(ax)
    return ax


def error_map(errors: Any, *, ax: Axes | None = None) -> Axes:
    """Root mean square error of every entry of T, row by row of the chunk.

    Parameters
    ----------
    errors : array, shape ``(C, C)``
        ``sqrt(mean E^2)`` over matrices.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    found = np.asarray(errors, dtype=np.float64)
    ax = axes(ax, 3.5)
    below = np.where(np.tri(len(found), k=-1, dtype=bool), found, np.nan)
    image = ax.imshow(below, cmap=SCALE, interpolation="nearest")
    ax.set(xlabel="column: token that acts", ylabel="row: token that is acted on")
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02)
    bar.set_label("root mean square error", color=INK, fontsize=TEXT)
    bar.ax.tick_params(colors=INK, labelsize=TEXT)
    bar.ax.yaxis.get_offset_text().set(color=INK, fontsize=TEXT)
    bar.outline.set_visible(False)
    return ax
