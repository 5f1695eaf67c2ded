"""What a plan says of how it came about, as tables and as JSON types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from qinvert.calibration.head_errors import HeadErrors, worst_head
from qinvert.cli.output import Output
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.strict_json import INFINITE

if TYPE_CHECKING:
    from qinvert.proof.proof import Proof

#: Headings of the table of candidates.
CANDIDATE_COLUMNS: Final = ("program", "format", "cost", "predicted sqnr, dB", "simulated sqnr, dB", "chosen")


def show_choices(output: Output, plan: Plan) -> None:
    """Print what calibration chose for each layer, what limits it, and why not something simpler."""
    from qinvert.calibration.figures_of_merit import split_gains

    rows = [[name, *_choice(layer)] for name, layer in plan.layers.items()]
    columns = [
        "layer",
        "program",
        "format",
        "cost",
        "sqnr, dB",
        "unseen data, dB, 90 % within",
        "floor, dB",
        "worst head, dB",
        "most noise",
        "meets goal",
    ]
    output.table("Plan", columns, rows)
    if "cost_unit" in plan.provenance:
        output.say(f"  cost: {plan.provenance['cost_unit']}")
    if "kl" in plan.provenance:
        facts = plan.provenance
        output.say(f"  KL to the exact inverse: {facts['kl']:.3g} nats, on {facts['output_tokens']:,} tokens")
        for name, layer in plan.layers.items():
            output.say(f"  {name}: output {_decibels(layer.provenance['output_sqnr_db'])} dB")
    if "data" in plan.provenance:
        data = plan.provenance["data"]
        output.say(f"  data: {data['tokens']:,} tokens in {data['sequences']:,} sequences")
    for split, (before, after) in split_gains(plan).items():
        output.say(f"  {split}: grids per head: its worst head gains, {before:.1f} to {after:.1f} dB")
    for name, layer in plan.layers.items():
        for rejected in layer.provenance["rejected"]:
            output.say(f"  {name}: passed over: {rejected}")
        if layer.provenance["fix"]:
            output.say(f"  {name}: misses its goal: {layer.provenance['fix']}")
        for caution in (*layer.provenance["head_cautions"], *layer.provenance["data_cautions"]):
            output.say(f"  {name}: caution: {caution}")


def _choice(layer: LayerPlan) -> list[str]:
    """Return the cells of one layer."""
    facts = layer.provenance
    binding, unseen = facts["binding"], facts["unseen"]
    return [
        layer.program.title,
        layer.formats,
        f"{facts['cost']:,}",
        _decibels(facts["expected_sqnr_db"]),
        "-" if unseen is None else unseen_cell(unseen),
        _decibels(facts["expected_floor_db"]),
        "-" if unseen is None else head_cell(facts.get("output_heads", unseen["heads"])),
        f"{binding['tensor']} {binding['share']:.0%}",
        "yes" if facts["meets_goal"] else "NO",
    ]


def unseen_cell(unseen: Mapping[str, Any]) -> str:
    """``31.1 (29.5 to 32.4), 128 matrices``; marked where the planner saw these matrices."""
    low, high = (_decibels(unseen[key]) for key in ("low_db", "high_db"))
    seen = "" if unseen["held_out"] else ", all seen"
    return f"{_decibels(unseen['sqnr_db'])} ({low} to {high}), {unseen['matrices']} matrices{seen}"


def head_cell(heads: Sequence[Mapping[str, Any]]) -> str:
    """``3: 21.3, 7 % of T, 36 % of o``: the worst head that carries signal, and its shares."""
    found = worst_head([HeadErrors(**head) for head in heads])
    if found is None:
        return "-"
    output = "" if found.output_share is None else f", {found.output_share:.1%} of o"
    return f"{found.head}: {_decibels(found.sqnr_db)}, {found.signal_share:.1%} of T{output}"


def _decibels(value: float) -> str:
    """Decibels of a plan, in which the largest number that it may hold stands for infinity."""
    return "exact" if value >= INFINITE else f"{value:.1f}"


def show_candidates(output: Output, layer: LayerPlan) -> None:
    """Print cost against sqnr of every candidate; a plan that was not calibrated has none."""
    keys = ("program", "formats", "cost", "predicted_sqnr_db", "simulated_sqnr_db", "chosen")
    rows = [[cell(row.get(key)) for key in keys] for row in listed_candidates(layer)]
    if rows:
        output.table("Candidates, cheapest first", CANDIDATE_COLUMNS, rows)


def listed_candidates(layer: LayerPlan) -> list[dict[str, Any]]:
    """Return the candidates that a plan lists; none where it holds something else there."""
    found = layer.provenance.get("candidates")
    return found if isinstance(found, list) and all(isinstance(row, dict) for row in found) else []


def cell(value: Any) -> str:
    """Return what a table shows of any JSON value."""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def layer_to_dict(layer: LayerPlan, proof: Proof) -> dict[str, Any]:
    """Return JSON types of what a plan says of a layer."""
    return {
        **layer.provenance,
        "program": layer.program.title,
        "formats": layer.formats,
        "requantize": str(layer.requantize),
        "accumulator_bound": proof.accumulator_bound,
        "headroom_bits": proof.headroom_bits,
        "cannot_saturate": proof.cannot_saturate,
        "may_saturate": proof.may_saturate,
        "partial": proof.partial,
        "unproved": proof.unproved,
    }
