"""Grids per head in the layers whose heads need them: plans with ``granularity="auto"``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from qinvert.calibration.chunk_steps.options import Scope
from qinvert.calibration.head_errors import HeadErrors, heads_below, worst_head
from qinvert.calibration.head_names import head_name, head_number, layer_name
from qinvert.calibration.inverse_planning import InversePlanning, shared_out
from qinvert.calibration.observation.held_out import held_out
from qinvert.calibration.output_goals import OutputGoals
from qinvert.calibration.planning.explanation import rounded_share
from qinvert.calibration.planning.unseen import head_cautions, held_out_db, listed_heads
from qinvert.documents import to_document
from qinvert.errors import PlanError
from qinvert.plan.plan import LayerPlan

#: Decibels that the worst head must gain where no more heads reach the goal: what one bit more gives.
#: Each head by itself is one more graph, and beyond reach of its goal it has the best plan at any cost.
LEAST_GAIN_DB: Final = 6.0
#: Goal of heads that carry no signal, in layers that are split: that of T = I.
NO_SIGNAL_DB: Final = 0.0
#: What helps where grids per head do not.
HIGHER_GOAL: Final = "pass a larger min_sqnr_db, or more sequences"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Heads of one layer under its whole plan and under plans of their own, on the same unseen matrices."""

    #: With the grids of the whole layer.
    whole: Sequence[HeadErrors]
    #: With grids of their own.
    apart: Sequence[HeadErrors]
    goal_db: float

    @property
    def gain_db(self) -> float:
        """Sqnr of the worst head that carries signal, apart minus whole."""
        before, after = worst_head(self.whole), worst_head(self.apart)
        return 0.0 if before is None or after is None else after.sqnr_db - before.sqnr_db

    @property
    def helps(self) -> bool:
        """Whether more heads reach the goal and the worst one gains, or as many and it gains 6 dB."""
        fewer = len(heads_below(self.whole, self.goal_db)) - len(heads_below(self.apart, self.goal_db))
        return self.gain_db > 0 if fewer > 0 else fewer == 0 and self.gain_db >= LEAST_GAIN_DB


def check_judged(scope: str, outputs: OutputGoals) -> None:
    """Refuse to judge heads by T where the goal is one of outputs.

    Raises
    ------
    PlanError
        With what rules it out.
    """
    given = "min_output_sqnr_db or max_kl" if outputs.given else f"scope={str(scope)!r}"
    if outputs.given or scope == Scope.CHUNK:
        raise PlanError(
            f"granularity='auto' judges heads by their T, and {given} sets goals for outputs; pass "
            "granularity='head' or 'tensor'"
        )


def plan_by_need(planning: InversePlanning, goal_db: float) -> dict[str, LayerPlan]:
    """Return a plan of every layer, or of each of its heads where one misses the goal and that helps.

    A head is judged on its own held-out matrices, on which neither of both plans was chosen,
    if it carries signal (`qinvert.calibration.head_errors.CARRIES`).  A head that does not asks
    for no bits: where its layer is split, its plan is the cheapest one.

    Parameters
    ----------
    planning : InversePlanning
        With observers of layers and of their heads.
    goal_db : float
        Goal for the sqnr of T, of layers and of heads.

    Raises
    ------
    InputError
        If another process fails.
    """
    heads = heads_by_layer(planning.observers)
    plans = planning.plan_all(goal_db, heads)

    def judged(layers: Sequence[str]) -> dict[str, tuple[HeadErrors, ...]]:
        return {layer: _errors(planning, dict.fromkeys(heads[layer], plans[layer])) for layer in layers}

    whole = shared_out(list(heads), judged)
    # A head of which only zeros were seen has nothing that grids could be chosen on.
    tried = [x for x in heads if heads_below(whole[x], goal_db) and len(whole[x]) == len(heads[x])]
    carries = {head_name(layer, h.head): h.carries_signal for layer in tried for h in whole[layer]}
    plans |= planning.plan_all(goal_db, [name for name in carries if carries[name]])
    plans |= planning.plan_all(min(goal_db, NO_SIGNAL_DB), [name for name in carries if not carries[name]])
    found: dict[str, LayerPlan] = {}
    for layer, names in heads.items():
        apart = {name: plans[name] for name in names} if layer in tried else {}
        split = Split(whole=whole[layer], apart=_planned(apart), goal_db=goal_db)
        if apart and split.helps:
            found |= {h: _of_head(p, split) for h, p in apart.items()}
        else:
            found[layer] = _of_layer(plans[layer], split, apart, planning.of_model)
    return found


def heads_by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of layers, each with the names of its heads that were given."""
    known = dict.fromkeys(names)
    layers: dict[str, list[str]] = {
        name: [] for name in known if layer_name(name) == name or layer_name(name) not in known
    }
    for name in known:
        if name not in layers:
            layers[layer_name(name)].append(name)
    return layers


def _errors(planning: InversePlanning, plans: Mapping[str, LayerPlan]) -> tuple[HeadErrors, ...]:
    """Return the errors of heads on their own held-out matrices; heads without any are left out."""
    found = []
    for name, plan in plans.items():
        observer, number = planning.observers[name], head_number(name)
        held = held_out(observer.sample, observer.held)
        if held is not None and number is not None:
            share = rounded_share(planning.shares[name])
            found.append(HeadErrors(head=number, sqnr_db=held_out_db(plan, held), signal_share=share))
    return tuple(found)


def _planned(apart: Mapping[str, LayerPlan]) -> tuple[HeadErrors, ...]:
    """Return the errors of heads as their own plans have them."""
    return tuple(HeadErrors(**row) for plan in apart.values() for row in plan.provenance["unseen"]["heads"])


def _of_head(plan: LayerPlan, split: Split) -> LayerPlan:
    """Return the plan of a head with what it would reach on the grids of its layer."""
    (own,) = plan.provenance["unseen"]["heads"]
    before = next(head.sqnr_db for head in split.whole if head.head == own["head"])
    return replace(plan, provenance={**plan.provenance, "whole_sqnr_db": before})


def _of_layer(plan: LayerPlan, split: Split, apart: Mapping[str, LayerPlan], of_model: bool) -> LayerPlan:
    """Return the plan of a layer that stays whole, with its heads as they were judged."""
    facts: dict[str, Any] = dict(plan.provenance)
    if not split.whole or facts["unseen"] is None:
        return plan
    heads = listed_heads(split.whole, split.goal_db, of_model)
    remedy = _remedy(split, apart) if facts["meets_goal"] else None
    facts["unseen"] = {**facts["unseen"], "heads": to_document(heads)}
    facts["head_cautions"] = head_cautions(heads, split.goal_db, remedy)
    return replace(plan, provenance=facts)


def _remedy(split: Split, apart: Mapping[str, LayerPlan]) -> str:
    """Say what would help heads that grids of their own do not help."""
    worst = worst_head(split.apart)
    if worst is None:
        return f"other heads are zero on this data, so that grids per head were not tried; {HIGHER_GOAL}"
    (own,) = (plan for name, plan in apart.items() if head_number(name) == worst.head)
    tried = f"grids per head would leave head {worst.head} at {worst.sqnr_db:.1f} dB"
    return f"{tried}; {own.provenance['fix'] or HIGHER_GOAL}"
