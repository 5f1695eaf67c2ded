"""Section on programs: every step with its scale, what is proved of it, and its error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from qinvert import plot
from qinvert.plot.program import PROVED, step_rows
from qinvert.report_page.evidence import Evidence
from qinvert.report_page.figure import Figure, Section, table
from qinvert.report_page.svg import svg
from qinvert.report_page.words import counted, decibels, short_title


def programs_section(found: Evidence) -> Section:
    """The programs of the entries in detail."""
    figures = tuple(_program(found, name, f"program-{place}") for place, name in enumerate(found.detailed))
    others = len(found.plan.layers) - len(found.detailed)
    more = f"{others} more entries have programs; name them with --layer (layers=... in Python) to see them."
    return Section(
        ident="programs",
        title="Programs, step by step",
        intro="Every tensor with the step that makes it, its format and scale, and what is proved of "
        "its range. "
        "Arcs lead from a tensor to the steps that read it.",
        figures=figures,
        lacks=(more,) if others else (),
    )


def _program(found: Evidence, name: str, ident: str) -> Figure:
    layer, errors = found.plan.layers[name], found.tensors.get(name)
    steps, proof = step_rows(layer), layer.proof()
    says = f"{counted(len(layer.program.steps), 'step')}. {_ranges(steps)}"
    if proof.accumulators:
        says += f" Accumulators reach at most {proof.accumulator_bound:,} and fit int32."
    coloured = "Colours say how large the error of a tensor is" if errors else "Colours say what is proved"
    rows = [
        [tensor, *cells, decibels(None if errors is None else errors.get(tensor))]
        for tensor, cells in steps.items()
    ]
    title = short_title(layer)
    words = f"Program of {name}: {title}. {says}"
    return Figure(
        ident=ident,
        title=f"{title} of {name}",
        says=f"{says} {coloured}.",
        alternative=words,
        svg=svg(plot.program(layer, errors), ident, words),
        table=table(
            f"Steps of {name}", ["tensor", "step", "format, scale, bound", "proof", "error, dB"], rows
        ),
        wide=True,
    )


def _ranges(steps: Mapping[str, tuple[str, str, str]]) -> str:
    """``Of 19 tensors 1 cannot saturate and 18 are covered.``: what is proved of how many tensors."""
    counts = Counter(proved for _, _, proved in steps.values())
    parts = [f"{counts[key]} {_PHRASES[key][counts[key] > 1]}" for key in PROVED if counts[key]]
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    return f"Of {counted(len(steps), 'tensor')} {listed}."


#: What is proved of one tensor, and of several.
_PHRASES: Final = {
    "cannot saturate": ("cannot saturate with any input", "cannot saturate with any input"),
    "covered": ("has a grid that covers its proved range", "have grids that cover their proved ranges"),
    "partial": (
        "is partial, so that nothing depends on its ends",
        "are partial, so that nothing depends on their ends",
    ),
    "may saturate": (
        "has a grid that ends before its proved range",
        "have grids that end before their proved ranges",
    ),
    "by data only": ("has a range by data alone", "have ranges by data alone"),
}
