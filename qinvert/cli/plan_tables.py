"""What a plan says of how it came about, as tables and as JSON types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qinvert.cli.output import Output
from qinvert.plan.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from qinvert.proof.proof import Proof


def show_choices(output: Output, plan: Plan) -> None:
    """Print what calibration chose for each layer, what limits it, and why not something simpler."""
    rows = []
    for name, layer in plan.layers.items():
        facts = layer.provenance
        binding = facts["binding"]
        rows.append(
            [
                name,
                layer.program.title,
                layer.formats,
                f"{facts['cost']:,}",
                f"{facts['predicted_sqnr_db']:.1f}",
                f"{facts['expected_sqnr_db']:.1f}",
                f"{facts['expected_floor_db']:.1f}",
                f"{binding['tensor']} {binding['share']:.0%}",
                "yes" if facts["meets_goal"] else "NO",
            ]
        )
    columns = [
        "layer",
        "program",
        "format",
        "cost",
        "predicted",
        "sqnr_db",
        "floor_db",
        "most noise",
        "meets goal",
    ]
    output.table("Plan", columns, rows)
    if "cost_unit" in plan.provenance:
        output.say(f"  cost: {plan.provenance['cost_unit']}")
    for name, layer in plan.layers.items():
        for rejected in layer.provenance["rejected"]:
            output.say(f"  {name}: not {rejected}")
        if layer.provenance["fix"]:
            output.say(f"  {name}: misses its goal: {layer.provenance['fix']}")


def show_candidates(output: Output, layer: LayerPlan) -> None:
    """Print cost against sqnr of every candidate; a plan that was not calibrated has none."""
    candidates = layer.provenance.get("candidates")
    if not isinstance(candidates, list) or not all(isinstance(row, dict) for row in candidates):
        return
    keys = ("program", "formats", "cost", "predicted_sqnr_db", "simulated_sqnr_db", "chosen")
    rows = [[_cell(row.get(key)) for key in keys] for row in candidates]
    output.table("Candidates, cheapest first", keys, rows)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.1f}"
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
