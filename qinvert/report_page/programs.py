"""Section on programs: every step with its scale, what is proved of it, and its error."""

from __future__ import annotations

from qinvert import plot
from qinvert.plot.program import step_rows
from qinvert.report_page.evidence import Evidence
from qinvert.report_page.figure import Figure, Section, table
from qinvert.report_page.svg import svg
from qinvert.report_page.words import decibels


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
    says = (
        f"{len(layer.program.steps)} steps; accumulators reach at most {proof.accumulator_bound:,} "
        "and fit int32; "
        f"{len(proof.cannot_saturate)} of {len(steps)} tensors cannot saturate, and "
        f"{len(proof.unproved)} rest on data alone."
    )
    coloured = "Colours say how large the error of a tensor is" if errors else "Colours say what is proved"
    rows = [
        [tensor, *cells, decibels(None if errors is None else errors.get(tensor))]
        for tensor, cells in steps.items()
    ]
    words = f"Program of {name}: {layer.program.title}. {says}"
    return Figure(
        ident=ident,
        title=f"{layer.program.title} of {name}",
        says=f"{says} {coloured}.",
        alternative=words,
        svg=svg(plot.program(layer, errors), ident, words),
        table=table(
            f"Steps of {name}", ["tensor", "step", "format, scale, bound", "proof", "error, dB"], rows
        ),
        wide=True,
    )
