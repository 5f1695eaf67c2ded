"""Plans and errors of whole chunk steps as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qinvert.cli.decibels import decibels
from qinvert.cli.output import Output
from qinvert.cli.plan_tables import cell, listed_candidates
from qinvert.plan.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from qinvert.calibration.chunk_steps.simulate_steps import StepReport
    from qinvert.proof.proof import Proof


def show_step_choices(output: Output, plan: Plan) -> None:
    """Print what calibration chose for each layer, and why nothing else."""
    columns = ["layer", "format", "wide", "o", "state", "cost", "goal"]
    output.table("Plan of chunk steps, o and state in dB", columns, [
        [name, layer.formats, " ".join(facts["widened"]) or "-", f"{facts['expected_sqnr_o_db']:.1f}",
         f"{facts['expected_sqnr_state_db']:.1f}", f"{facts['cost']:,}", _yes(facts["meets_goal"], "NO")]
        for name, layer, facts in ((n, p, p.provenance) for n, p in plan.layers.items())
    ])  # fmt: skip
    output.say(f"  cost: {plan.provenance['cost_unit']}")
    for title in dict.fromkeys(layer.program.title for layer in plan.layers.values()):
        output.say(f"  {title}")
    for name, layer in plan.layers.items():
        facts = layer.provenance
        (chosen,) = (row for row in facts["candidates"] if row["chosen"])
        output.say(f"  {name}: channels {chosen['channels']}, ranges by {chosen['ranges']}")
        for rejected in facts["rejected"]:
            output.say(f"  {name}: passed over: {rejected}")
        if facts["fix"]:
            output.say(f"  {name}: misses its goal: {facts['fix']}")


def _yes(value: bool, no: str) -> str:
    return "yes" if value else no


def show_step_candidates(output: Output, layer: LayerPlan) -> None:
    """Print cost against sqnr of every candidate; a plan that was not calibrated has none."""
    columns = ["wide", "channels", "ranges", "cost", "o", "state", "chosen"]
    keys = ("widened", "channels", "ranges", "cost", "sqnr_o_db", "sqnr_state_db", "chosen")
    rows = [[cell(row.get(key)) for key in keys] for row in listed_candidates(layer)]
    if rows:
        output.table("Candidates, cheapest first, o and state in dB", columns, rows)


def show_step_plan(output: Output, name: str, layer: LayerPlan, proof: Proof) -> None:
    """Print the groups of a layer: their formats, and which ranges are proved and which need data."""
    from qinvert.calibration.chunk_steps.widths import width_groups
    from qinvert.program.program import Program

    output.say(f"{name}: {layer}")
    if layer.channels is not None:
        turned = "multiplied by Hadamard's matrix" if layer.channels.rotated else "divided by powers of two"
        output.say(f"  value channels are {turned}")
    assert isinstance(layer.program, Program)
    margins = layer.provenance.get("margins")
    rows = [
        [group, *_group(layer, proof, members), _margin(margins, group)]
        for group, members in width_groups(layer.program).groups.items()
    ]
    columns = ["group", "tensors", "format", "proved", "by data", "needs data first", "margin"]
    output.table(
        f"{name}: {len(layer.program.steps)} steps, ranges of every group",
        columns,
        rows,
    )


def _group(layer: LayerPlan, proof: Proof, members: tuple[str, ...]) -> list[str]:
    # A range that needs data is that of no tensor with a proof, or one that ends before the proved range.
    open_ = [name for name in members if name in proof.unproved or name in proof.may_saturate]
    formats = "+".join(dict.fromkeys(layer.tensors[name].format.name for name in members))
    return [
        str(len(members)),
        formats,
        str(len(members) - len(open_)),
        str(len(open_)),
        open_[0] if open_ else "-",
    ]


def _margin(margins: object, group: str) -> str:
    margin = margins.get(group) if isinstance(margins, Mapping) else None
    return f"{margin:.2f}" if isinstance(margin, (int, float)) else "-"


def show_step_report(output: Output, steps: Mapping[str, StepReport]) -> None:
    """Print the errors of simulated steps, and which tensors saturate."""
    columns = ["layer", "o", "state", "one step", "T", "worst o", "saturated", "tokens"]
    output.table("Simulated chunk steps, sqnr in dB", columns, [
        [name, decibels(r.sqnr_o_db), decibels(r.sqnr_state_db),
         f"{decibels(r.step_sqnr_o_db)}, {decibels(r.step_sqnr_state_db)}",
         "-" if r.sqnr_t_db is None else decibels(r.sqnr_t_db), _worst(r),
         str(sum(r.saturations.values())), str(r.tokens)]
        for name, r in steps.items()
    ])  # fmt: skip
    for name, report in steps.items():
        if report.saturations:
            found = ", ".join(f"{tensor} {count:,}" for tensor, count in report.saturations.items())
            output.say(
                f"  warning: {name}: values at the ends of their grids: {found}; calibrate on longer "
                "contexts, or with a larger --state-margin or wider values"
            )


def _worst(report: StepReport) -> str:
    """``1: 27.3``: the head whose output is worst."""
    heads = list(enumerate(report.head_sqnr_o_db))
    if len(heads) < 2:
        return "-"
    head, value = min(heads, key=lambda pair: pair[1])
    return f"{head}: {decibels(value)}"
