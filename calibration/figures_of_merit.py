"""The sqnr of one entry of a plan wherever it was predicted or measured, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qinvert.calibration.head_errors import HeadErrors, worst_head
from qinvert.calibration.head_names import layer_name
from qinvert.calibration.simulate import Report
from qinvert.plan.plan import LayerPlan, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Decibels; None where nobody predicted or measured them."""

    #: Of the noise of each grid by itself.
    predicted_db: float | None
    #: On the sample on which the plan was chosen.
    sample_db: float | None
    #: Of the exact inverse on the same grids, on that sample.
    floor_db: float | None
    #: On matrices that nothing was chosen on, and between what 90 % of the resamples lie.
    held_out_db: float | None
    held_out_low_db: float | None
    held_out_high_db: float | None
    #: On the data of a later simulation.
    now_db: float | None

    @property
    def judged_db(self) -> float | None:
        """The figure to trust: that of data which nothing was chosen on, the latest first."""
        known = (self.now_db, self.held_out_db, self.sample_db, self.predicted_db)
        return next((value for value in known if value is not None), None)


def figures_of(name: str, plan: LayerPlan, report: Report | None = None) -> Figures:
    """Return the figures of one entry, of chunk steps those of output and state, the smaller one.

    Parameters
    ----------
    name : str
        Entry of the plan.
    plan : LayerPlan
    report : Report, optional
        Of `qinvert.simulate`.
    """
    facts: Mapping[str, Any] = plan.provenance
    unseen = facts.get("unseen") or {}
    return Figures(
        predicted_db=facts.get("predicted_sqnr_db"),
        sample_db=facts.get("expected_sqnr_db"),
        floor_db=facts.get("expected_floor_db"),
        held_out_db=unseen.get("sqnr_db"),
        held_out_low_db=unseen.get("low_db"),
        held_out_high_db=unseen.get("high_db"),
        now_db=None if report is None else _now(name, report),
    )


def _now(name: str, report: Report) -> float | None:
    found = report.layers.get(name) or report.steps.get(name)
    return None if found is None else found.sqnr_db


def split_gains(plan: Plan) -> dict[str, tuple[float, float]]:
    """Return the sqnr of the worst head of each layer that granularity="auto" split, before and after."""
    before: dict[str, list[HeadErrors]] = {}
    after: dict[str, list[HeadErrors]] = {}
    for name, layer in plan.layers.items():
        if "whole_sqnr_db" in layer.provenance:
            (own,) = (HeadErrors(**row) for row in layer.provenance["unseen"]["heads"])
            whole = replace(own, sqnr_db=layer.provenance["whole_sqnr_db"])
            after.setdefault(layer_name(name), []).append(own)
            before.setdefault(layer_name(name), []).append(whole)
    worst = {layer: (worst_head(before[layer]), worst_head(after[layer])) for layer in after}
    return {
        layer: (b.sqnr_db, a.sqnr_db) for layer, (b, a) in worst.items() if b is not None and a is not None
    }
