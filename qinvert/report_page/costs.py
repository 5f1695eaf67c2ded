"""Section on costs: what every candidate costs and reaches, and what the plan costs on chips."""

from __future__ import annotations

from qinvert import plot
from qinvert.calibration.planning.verdicts import Outcome, Verdict, verdicts
from qinvert.errors import QInvertError
from qinvert.hardware import HARDWARE, Hardware
from qinvert.plan.plan import LayerPlan
from qinvert.profiles import find_profile
from qinvert.report_page.evidence import Evidence
from qinvert.report_page.figure import Figure, Section, Table, table
from qinvert.report_page.svg import svg
from qinvert.report_page.words import decibels, number, short_title

#: Matrices per call where the plan does not name a number.
BATCH = 8


def costs_section(found: Evidence) -> Section:
    """Cost against sqnr of every candidate of the entries in detail, and the plan's cost on every chip."""
    figures = [
        _candidates(found, name, f"candidates-{place}")
        for place, name in enumerate(found.detailed)
        if found.plan.layers[name].provenance.get("candidates")
    ]
    lacks = () if figures else ("The plan has no candidates: it was not made by `calibrate`.",)
    chips = _chips(found)
    return Section(
        ident="costs",
        title="Cost against error",
        intro="Every program that was weighed for a layer. The cheapest one that reaches the goals "
        "is chosen; the "
        "table under each figure has the reason for every other one.",
        figures=tuple(figures),
        tables=() if chips is None else (chips,),
        lacks=lacks,
    )


def _candidates(found: Evidence, name: str, ident: str) -> Figure:
    layer, unit = found.plan.layers[name], str(found.plan.provenance.get("cost_unit", ""))
    goal_db = found.goal_db
    weighed = verdicts(layer, goal_db, found.max_loss_db)
    says = _words(weighed, short_title(layer))
    drawn = plot.cost_against_sqnr(layer, goal_db, max_loss_db=found.max_loss_db, unit=unit)
    rows = [
        [v.program, v.formats or "-", str(v.outcome), number(v.cost), _sqnr(v), v.reason] for v in weighed
    ]
    columns = ["program", "format", "outcome", f"cost, {unit}" if unit else "cost", "sqnr, dB", "reason"]
    return Figure(
        ident=ident,
        title=f"Candidates of {name}",
        says=says,
        alternative=f"Cost against sqnr of the candidates of {name}. {says}",
        svg=svg(drawn, ident, f"Cost against sqnr of the candidates of {name}. {says}"),
        table=table(f"Candidates of {name}", columns, rows),
    )


def _sqnr(verdict: Verdict) -> str:
    kind = "" if verdict.simulated or verdict.sqnr_db is None else ", predicted"
    return f"{decibels(verdict.sqnr_db)}{kind}"


def _words(weighed: list[Verdict], chosen: str) -> str:
    counts = {outcome: sum(v.outcome is outcome for v in weighed) for outcome in Outcome}
    others = ", ".join(
        f"{count} {_PHRASES[outcome][count > 1]}"
        for outcome, count in counts.items()
        if count and outcome in _PHRASES
    )
    first = f"{chosen} was chosen. " if counts[Outcome.CHOSEN] else ""
    return (
        f"{first}Of {len(weighed)} candidates {others}." if others else f"{first}It was the only candidate."
    )


#: What one candidate does, and what several do.
_PHRASES = {
    Outcome.COSTLIER: ("reaches the goals and costs more", "reach the goals and cost more"),
    Outcome.ALIKE: ("is no better", "are no better"),
    Outcome.FAR_FROM_FLOOR: ("loses too much against its own grids", "lose too much against their own grids"),
    Outcome.BELOW_GOAL: ("stays below the goal", "stay below the goal"),
    Outcome.REFUSED: ("is refused by the compiler", "are refused by the compiler"),
    Outcome.GROWS: (
        "was passed over because its powers grow",
        "were passed over because their powers grow",
    ),
}


def _chips(found: Evidence) -> Table | None:
    """Return what each entry costs on each chip that takes its formats, None if there is none."""
    batch = int(found.plan.provenance.get("batch", BATCH))
    if found.of_steps:
        return None
    chips = [
        chip for chip in HARDWARE.values() if any(_cost(chip, p, batch) for p in found.plan.layers.values())
    ]
    if not chips:
        return None
    rows = [
        [name, *(_cost(chip, layer, batch) or "-" for chip in chips)]
        for name, layer in found.plan.layers.items()
    ]
    columns = ["layer", *(f"{chip.name}, {chip.unit}" for chip in chips)]
    return table(f"Estimated cost of {batch} matrices on chips that take the plan's formats", columns, rows)


def _cost(chip: Hardware, layer: LayerPlan, batch: int) -> str | None:
    formats = {grid.format for grid in layer.tensors.values()}
    if not any(formats <= set(find_profile(target).formats) for target in chip.targets):
        return None
    try:
        return number(float(f"{chip.best_chains(layer, batch)[1]:.4g}"))
    except QInvertError:
        # The chip's table has no weights for such a graph.
        return None
