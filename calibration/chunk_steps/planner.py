"""Chooses value channels, ranges and widths of a chunk step by what they reach and cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from qinvert.calibration.choices import RangeRule
from qinvert.calibration.chunk_steps.candidate import Candidate, Layer, finite_db, measure, plan_layer
from qinvert.calibration.chunk_steps.grids import value_exponents
from qinvert.calibration.chunk_steps.options import WIDE_BITS
from qinvert.calibration.planning.costs import Costs
from qinvert.chunk_step.ports import KEY, STATE, VALUE
from qinvert.methods import AUTO
from qinvert.plan.value_channels import ValueChannels

#: Tensors whose channels may be made equally large; the new values are what all products of values read.
EQUALIZED: Final = ("v_new", VALUE)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepChoices:
    """What a caller leaves open or fixes."""

    min_sqnr_db: float
    #: Whether groups may get more bits, one by one.
    widens: bool
    #: Whether all groups have the wide format from the start.
    all_wide: bool
    #: Width of values, and that of the state; "auto" leaves it to the planner.
    value_bits: int | str
    state_bits: int | str
    #: Whether channels of values are divided by powers of two; None leaves it to the planner.
    equalize: bool | None
    #: Whether values are multiplied by Hadamard's matrix.
    rotated: bool
    #: Range rules that narrow values may have.
    ranges: tuple[RangeRule, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepChoice:
    """The chosen candidate, and all that were simulated."""

    best: Candidate
    candidates: tuple[Candidate, ...]
    meets_goal: bool

    def to_json(self, choices: StepChoices) -> dict[str, Any]:
        """Return what is known of the choice, as JSON types."""
        best = self.best
        return {
            "scope": "chunk",
            "meets_goal": self.meets_goal,
            "expected_sqnr_db": finite_db(best.sqnr_db),
            "expected_sqnr_o_db": finite_db(best.sqnr_o_db),
            "expected_sqnr_state_db": finite_db(best.sqnr_state_db),
            "widened": list(best.widened),
            "cost": best.whole_cost,
            "candidates": [candidate.to_json(candidate is best) for candidate in self.candidates],
            "rejected": [_reason(candidate, self) for candidate in self.candidates if candidate is not best],
            "fix": "" if self.meets_goal else self._fix(choices),
        }

    def _fix(self, choices: StepChoices) -> str:
        reached = f"lower min_sqnr_db to {best_db(self.candidates):.0f}"
        if choices.widens or choices.all_wide:
            return f"no wider grid of this target helps; {reached}"
        return f"pass bits='auto' with a target of 16 bits, such as npu-qdq-int16, or {reached}"


def best_db(candidates: tuple[Candidate, ...]) -> float:
    """Return the largest sqnr that any candidate reaches."""
    return max(candidate.sqnr_db for candidate in candidates)


def choose_step(layer: Layer, choices: StepChoices, costs: Costs) -> StepChoice:
    """Return the cheapest candidate that reaches the goal on the sample, or the best one if none does.

    It starts from narrow grids with the value channels and ranges that serve
    them best.  Then it gives more bits to the group that removes the most noise
    for its cost, one group after the other, until the goal is reached.
    """
    groups = (*layer.widths.value_groups, KEY)
    seen: list[Candidate] = []

    def tried(widened: tuple[str, ...], channels: ValueChannels | None, rule: RangeRule) -> Candidate:
        plan = plan_layer(layer, widened, channels, rule)
        sqnr_o, sqnr_state = measure(layer, plan)
        candidate = Candidate(
            plan=plan,
            widened=widened,
            ranges=rule,
            sqnr_o_db=sqnr_o,
            sqnr_state_db=sqnr_state,
            cost=costs.of(plan),
        )
        seen.append(candidate)
        return candidate

    start, fixed = _start(groups, choices)
    # Only narrow values are clipped.
    rules = choices.ranges if set(groups[:-1]) - set(start) else (RangeRule.MAX,)
    bases = [tried(start, channels, rule) for channels in _channels(layer, choices) for rule in rules]
    best = min(bases, key=lambda candidate: candidate.noise)
    while best.sqnr_db < choices.min_sqnr_db and choices.widens:
        rest = [group for group in groups if group not in (*best.widened, *fixed)]
        if not rest:
            break
        wider = [tried((*best.widened, group), best.plan.channels, best.ranges) for group in rest]
        best = max(wider, key=lambda candidate: _gain(candidate, best))
    final = best if best.sqnr_db >= choices.min_sqnr_db else max(seen, key=lambda c: c.sqnr_db)
    return StepChoice(
        best=final,
        candidates=tuple(sorted(seen, key=lambda candidate: candidate.cost)),
        meets_goal=final.sqnr_db >= choices.min_sqnr_db,
    )


def _start(groups: tuple[str, ...], choices: StepChoices) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the groups that are wide from the start, and those whose width the caller has fixed."""
    if choices.all_wide:
        return groups, groups
    bits = {group: choices.state_bits if group == STATE else choices.value_bits for group in groups[:-1]}
    wide = tuple(group for group, wanted in bits.items() if wanted == WIDE_BITS)
    return wide, tuple(group for group, wanted in bits.items() if wanted != AUTO)


def _gain(wider: Candidate, narrower: Candidate) -> float:
    """Noise that is removed for a unit of cost."""
    return (narrower.noise - wider.noise) / max(1.0, wider.cost - narrower.cost)


def _channels(layer: Layer, choices: StepChoices) -> Iterator[ValueChannels | None]:
    size = layer.observed.largest[VALUE].shape[-1]
    if choices.rotated:
        yield ValueChannels(exponents=((0,) * size,), rotated=True)
        return
    if choices.equalize is not True:
        yield None
    if choices.equalize is not False:
        found = {
            value_exponents(layer.observed, name) for name in EQUALIZED if name in layer.observed.largest
        }
        # In one order, whatever the hash of a tuple.
        yield from (ValueChannels(exponents=exponents) for exponents in sorted(found))


def _reason(candidate: Candidate, choice: StepChoice) -> str:
    best = choice.best
    wide = " and ".join(candidate.widened) or "no group"
    scaled = "channels scaled" if candidate.plan.channels else "channels as they are"
    what = f"{wide} wide, {scaled}, ranges by {candidate.ranges}"
    reached = f"o has {candidate.sqnr_o_db:.1f} dB and the state {candidate.sqnr_state_db:.1f} dB"
    if candidate.cost > best.cost:
        return f"{what}: it costs {candidate.cost / best.cost:.2f} times as much ({reached})"
    return f"{what}: {reached}"
