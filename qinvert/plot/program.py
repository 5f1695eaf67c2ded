"""A plan's program as a drawing: one line for each step, and arcs from what it reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from qinvert.plan.plan import LayerPlan
from qinvert.plot.canvas import BAD, FIRST, INK, MUTED, SCALE, SECOND, TEXT, THIRD, axes, shortened
from qinvert.program.printing import step_formula

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qinvert.proof.proof import Proof

#: Height of a line, inches, and of what stands above and below all lines.
LINE: Final = 0.215
ENDS: Final = 0.75
#: Width of the drawing, inches, and what one unit of its x axis is.
WIDTH: Final = 7.8
#: Where arcs end, where marks, names, formulas and grids begin, and the right end.
ARCS: Final = 0.0
MARKS: Final = 0.012
NAMES: Final = 0.03
FORMULAS: Final = 0.24
GRIDS: Final = 0.69
END: Final = 0.9
#: Radius of the longest arc.
RADIUS: Final = 0.15
#: Right end of the last texts.
RIGHT: Final = 1.05
#: Longest name and formula that are written.
NAME: Final = 20
FORMULA: Final = 43
#: What a proof says of a tensor, with the colour of its mark where nothing was measured.
PROVED: Final = {
    "cannot saturate": THIRD,
    "covered": FIRST,
    "partial": MUTED,
    "may saturate": SECOND,
    "by data only": BAD,
}


def program(plan: LayerPlan, errors: Mapping[str, float] | None = None, *, ax: Axes | None = None) -> Axes:
    """Every tensor with its step, format, scale and proof, coloured by its error.

    Parameters
    ----------
    plan : LayerPlan
    errors : mapping, optional
        Sqnr in dB of every tensor, see `qinvert.calibration.tensor_errors.tensor_errors`; without
        it the colours say what is proved.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    rows = step_rows(plan)
    ax = axes(ax, ENDS + LINE * (len(rows) + 1), WIDTH)
    places = {name: number for number, name in enumerate(rows)}
    _arcs(ax, plan, places)
    colours = _colours(rows, errors)
    headers = ("tensor", "step", "format, scale, bound", "error, dB" if errors else "proof")
    for x, text in zip((NAMES, FORMULAS, GRIDS, END), headers, strict=True):
        ax.text(x, -1, text, fontsize=TEXT - 1, color=MUTED, va="center", weight="bold")
    ax.scatter([MARKS] * len(rows), list(places.values()), c=colours, s=34, marker="s", zorder=3)
    for name, (formula, grid, proved) in rows.items():
        last = proved if errors is None else _decibels(errors.get(name))
        cells = (
            (NAMES, shortened(name, NAME)),
            (FORMULAS, _cut(formula, FORMULA)),
            (GRIDS, grid),
            (END, last),
        )
        for x, text in cells:
            ax.text(x, places[name], text, fontsize=TEXT - 1, color=INK, va="center", parse_math=False)
    ax.set_xlim(-RADIUS, RIGHT)
    ax.set_ylim(len(rows) - 0.4, -1.5)
    ax.set_axis_off()
    return ax


def step_rows(plan: LayerPlan) -> dict[str, tuple[str, str, str]]:
    """Formula, grid with bound, and proof of every tensor by its name, in the order of the program."""
    program, proof = plan.program, plan.proof()
    formulas = {port.name: "input" for port in program.inputs}
    formulas |= {step.output: step_formula(step) for step in program.steps}
    bounds = {step.output: step.bound for step in program.steps}
    return {
        name: (formulas[name], _grid(plan, name, bounds.get(name)), proved(proof, name))
        for name in program.tensors
    }


def proved(proof: Proof, name: str) -> str:
    """What a proof says of a tensor, one of the keys of `PROVED`."""
    groups: dict[str, Any] = {
        "cannot saturate": proof.cannot_saturate,
        "covered": proof.covered,
        "partial": proof.partial,
        "may saturate": proof.may_saturate,
    }
    return next((text for text, names in groups.items() if name in names), "by data only")


def _grid(plan: LayerPlan, name: str, bound: float | None) -> str:
    grid = plan.tensors[name]
    return f"{grid.format.name} {grid.scale:.3g}" + ("" if bound is None else f", ≤ {bound:.3g}")


def _arcs(ax: Axes, plan: LayerPlan, places: Mapping[str, int]) -> None:
    from matplotlib.collections import LineCollection

    # Constants have no line.
    lines = [
        _arc(places[source], places[step.output], len(places))
        for step in plan.program.steps
        for source in dict.fromkeys(step.inputs)
        if source in places
    ]
    ax.add_collection(LineCollection(lines, colors=MUTED, linewidths=0.7, alpha=0.8))


def _arc(start: int, end: int, lines: int) -> list[tuple[float, float]]:
    """Points of half an ellipse on the left of two lines, wider for lines that are far apart."""
    radius = RADIUS * min(1.0, 0.12 + (end - start) / max(lines, 12))
    middle, half = (start + end) / 2, (end - start) / 2
    angles = [math.pi * i / 16 for i in range(17)]
    return [(ARCS - radius * math.sin(a), middle - half * math.cos(a)) for a in angles]


def _colours(rows: Mapping[str, tuple[str, str, str]], errors: Mapping[str, float] | None) -> list[Any]:
    if errors is None:
        return [PROVED[proved] for _, _, proved in rows.values()]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    known = [e for e in errors.values() if math.isfinite(e)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    span = max(high - low, 1.0)
    # Red and yellow would say good and bad; these colours say less and more.
    return [
        to_hex(colormaps[SCALE](min(max((errors.get(name, high) - low) / span, 0.0), 1.0))) for name in rows
    ]


def _decibels(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if math.isfinite(value) else "exact" if value > 0 else "lost"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
