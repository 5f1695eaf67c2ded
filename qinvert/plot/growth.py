"""How far powers of M outgrow the inverse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from qinvert.calibration.growth import RangeGrowth
from qinvert.formats import INT8, IntFormat
from qinvert.plot.canvas import BAD, MUTED, SERIES, TEXT, axes, grid, legend, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Layers that have a colour and a name of their own.
NAMED: Final = len(SERIES)
#: Growth below this is drawn at the lower end.
LEAST: Final = 1e-3


def range_growth(growth: Mapping[str, RangeGrowth], fmt: IntFormat = INT8, *, ax: Axes | None = None) -> Axes:
    """``max|M^k| / max(max|M|, max|T - I|)`` by k, one line for each layer.

    A grid of integers up to ``fmt.largest`` that covers a power spends its steps on that power.
    Above the line of ``fmt.largest`` one step is larger than every value of the inverse.

    Parameters
    ----------
    growth : mapping
        Results of `qinvert.range_growth` by layer; the layers that grow the most have names.
    fmt : IntFormat
        Format whose range is drawn.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes(ax, 3.4)
    order = sorted(growth, key=lambda name: -growth[name].growth)
    for number, name in reversed(list(enumerate(order))):
        known = relative_powers(growth[name])
        named = number < NAMED
        ax.plot(
            list(known), [max(value, LEAST) for value in known.values()],
            color=SERIES[number] if named else MUTED, marker="o" if named else None, markersize=4,
            linewidth=1.6 if named else 0.6, label=shortened(name) if named else None,
        )  # fmt: skip
    ax.axhline(
        fmt.largest,
        color=BAD,
        linewidth=1.2,
        linestyle="--",
        label=f"{fmt.name}: {fmt.largest} steps",
    )
    ax.axhline(1, color=MUTED, linewidth=1, linestyle=":", label="the inverse")
    ax.set(xscale="log", yscale="log", xlabel="power k of M", ylabel="max|M^k| / max(|M|, |T - I|)")
    ax.set_ylim(bottom=LEAST)
    powers = sorted({k for g in growth.values() for k in g.powers})
    ax.set_xticks(powers, [str(k) for k in powers], fontsize=TEXT)
    ax.minorticks_off()
    grid(ax)
    legend(ax)
    return ax


def relative_powers(growth: RangeGrowth) -> dict[int, float]:
    """``max|M^k|`` over the larger of max|M| and max|T - I|, by k, without what is not finite."""
    largest = max(growth.inverse, growth.powers[1])
    return {k: value / largest for k, value in growth.powers.items() if largest > 0 and value < float("inf")}
