"""What an error of T becomes inside the layer, and which layers do the most harm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from qinvert.calibration.evaluate import Evaluation, LayerErrors
from qinvert.plot.canvas import FIRST, MUTED, SERIES, TEXT, axes, grid, legend, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Field of `qinvert.LayerErrors` and its name, in the order in which a layer computes them.
STAGES: Final = (
    ("t", "T"),
    ("u", "U = T(βv)"),
    ("w", "W = T(βk e^G)"),
    ("state", "state"),
    ("out", "output"),
)
#: Layers that have a colour and a name of their own, and layers of a ranking.
NAMED: Final = len(SERIES)
RANKED: Final = 24


def error_path(evaluation: Evaluation, *, ax: Axes | None = None) -> Axes:
    """Sqnr of T, of what is computed from it, and of the layer's output, one line for each layer.

    Parameters
    ----------
    evaluation : Evaluation
        Of `qinvert.evaluate`.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes(ax, 3.1)
    stages = [(field, name) for field, name in STAGES if _known(evaluation, field)]
    order = list(harm(evaluation))
    for number, layer in reversed(list(enumerate(order))):
        errors, named = evaluation.layers[layer], number < NAMED
        values = [getattr(errors, field) for field, _ in stages]
        shown = [v if v is not None and math.isfinite(v) else math.nan for v in values]
        ax.plot(range(len(stages)), shown, marker="o", markersize=4, color=SERIES[number] if named else MUTED,
                linewidth=1.6 if named else 0.6, label=shortened(layer) if named else None)  # fmt: skip
    ax.set_xticks(range(len(stages)), [name for _, name in stages], fontsize=TEXT)
    ax.set_ylabel("sqnr, dB")
    grid(ax, "y")
    if order:
        legend(ax)
    return ax


def _known(evaluation: Evaluation, field: str) -> bool:
    return any(getattr(errors, field) is not None for errors in evaluation.layers.values())


def harm(evaluation: Evaluation) -> dict[str, float]:
    """Share of each layer in the sum of all layers' relative output noise, the largest first.

    The noise of a layer is ``||o_hat - o||^2 / ||o||^2``.
    """
    noise = {name: _noise(errors) for name, errors in evaluation.layers.items()}
    total = sum(noise.values()) or 1.0
    shares = {name: value / total for name, value in noise.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _noise(errors: LayerErrors) -> float:
    # Noise without a bound is as bad as finite numbers can say.
    return 10 ** (-max(errors.out, -300.0) / 10)


def layer_harm(evaluation: Evaluation, *, ax: Axes | None = None) -> Axes:
    """Layers by their share in the relative noise of all outputs, see `harm`.

    Parameters
    ----------
    evaluation : Evaluation
        Of `qinvert.evaluate`.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ranked = dict(list(harm(evaluation).items())[:RANKED])
    ax = axes(ax, 1.0 + 0.27 * len(ranked))
    bars = ax.barh(range(len(ranked)), [100 * share for share in ranked.values()], color=FIRST, height=0.6)
    ax.bar_label(bars, [f"{share:.0%}" for share in ranked.values()], fontsize=TEXT, padding=3, color=MUTED)
    ax.set_yticks(range(len(ranked)), [shortened(name, 26) for name in ranked], fontsize=TEXT)
    ax.invert_yaxis()
    ax.set_xlim(0, 115)
    ax.set_xticks(range(0, 101, 25))
    ax.set_xlabel("share of the relative noise of all outputs, %")
    grid(ax, "x")
    return ax
