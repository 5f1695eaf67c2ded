"""Chooses value channels, ranges and widths of a chunk step by what they reach and cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qinvert.calibration.choices import RangeRule
from qinvert.calibration.chunk_steps.candidate import (
    Candidate,
    Layer,
    Scaling,
    finite_db,
    measure,
    plan_layer,
)
from qinvert.calibration.chunk_steps.grids import value_exponents
from qinvert.calibration.chunk_steps.options import WIDE_BITS
from qinvert.calibration.chunk_steps.widths import Widths
from qinvert.calibration.planning.costs import Costs
from qinvert.chunk_step.ports import KEY, NEW_VALUES, READ_STATE, STATE, VALUE
from qinvert.errors import PlanError
from qinvert.formats import FLOAT32, NARROW_BITS
from qinvert.methods import AUTO
from qinvert.plan.value_channels import ValueChannels

#: Tensors whose channels may be made equally large, on the mean of their logarithms: the new values,
#: which all products of values read; or also what T is applied to, and the outputs.
EQUALIZED: Final = ((NEW_VALUES,), (NEW_VALUES, "rhs", "o"))


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
    #: Whether products read a state in 8 bits that is carried in more.
    reads_narrow: bool
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
        reached = f"lower min_sqnr_db to {math.floor(best_db(self.candidates))}"
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
    for its cost, one group after the other, until the goal is reached, and takes
    back what the goal turns out not to need.
    """
    search = _Search(layer, choices, costs)
    best = search.base()
    if choices.widens:
        best = search.narrowed(search.widened(best))
    reaching = [c for c in search.seen if c.sqnr_db >= choices.min_sqnr_db]
    met = bool(reaching)
    final = best if best in reaching else _gentlest(reaching or search.seen)
    candidates = tuple(sorted(search.seen, key=lambda candidate: candidate.cost))
    return StepChoice(best=final, candidates=candidates, meets_goal=met)


def _gentlest(candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate with the least noise in its channels."""
    return min(candidates, key=lambda candidate: candidate.measured.channel_noise)


class _Search:
    """Candidates of one layer, each simulated once."""

    def __init__(self, layer: Layer, choices: StepChoices, costs: Costs) -> None:
        self.layer, self.choices, self.costs = layer, choices, costs
        self.groups = (*layer.widths.value_groups, KEY)
        self.start, fixed = _start(self.groups, choices)
        self.fixed = {*fixed, *layer.widths.narrow_groups}
        self._found: dict[tuple[frozenset[str], Scaling, RangeRule], Candidate] = {}

    @property
    def seen(self) -> list[Candidate]:
        """All candidates, in the order in which they were simulated."""
        return list(self._found.values())

    def base(self) -> Candidate:
        """Return the candidate that serves the channels best among those with only the fixed groups wide."""
        # Only narrow values are clipped.
        narrow = {*self.groups[:-1]} - {*self.start}
        rules = self.choices.ranges if narrow else (RangeRule.MAX,)
        scalings = list(_scalings(self.layer, self.choices))
        bases = [self._tried(self.start, scaling, rule) for scaling in scalings for rule in rules]
        return _gentlest(bases)

    def widened(self, best: Candidate) -> Candidate:
        """Widen group after group until the goal is reached."""
        while not self._meets(best):
            rest = [group for group in self._free if group not in best.widened]
            if not rest:
                break
            wider = [self._like(best, (*best.widened, group)) for group in rest]
            best = max(wider, key=lambda candidate: _gain(candidate, best))
        return best

    def narrowed(self, best: Candidate) -> Candidate:
        """Take back the costliest group that the goal does not need, until it needs all."""
        while self._meets(best):
            given = [group for group in best.widened if group in self._free]
            fewer = [self._like(best, tuple(g for g in best.widened if g != group)) for group in given]
            enough = [candidate for candidate in fewer if self._meets(candidate)]
            if not enough:
                break
            best = min(enough, key=lambda candidate: candidate.cost)
        return best

    @property
    def _free(self) -> list[str]:
        return [group for group in self.groups if group not in self.fixed]

    def _meets(self, candidate: Candidate) -> bool:
        return candidate.sqnr_db >= self.choices.min_sqnr_db

    def _like(self, other: Candidate, widened: tuple[str, ...]) -> Candidate:
        return self._tried(widened, other.scaling, other.ranges)

    def _tried(self, widened: tuple[str, ...], scaling: Scaling, rule: RangeRule) -> Candidate:
        key = (frozenset(widened), scaling, rule)
        if key not in self._found:
            self._found[key] = self._simulated(widened, scaling, rule)
        return self._found[key]

    def _simulated(self, widened: tuple[str, ...], scaling: Scaling, rule: RangeRule) -> Candidate:
        plan = plan_layer(self.layer, widened, scaling.channels, rule)
        return Candidate(
            plan=plan,
            widened=widened,
            scaling=scaling,
            ranges=rule,
            measured=measure(self.layer, plan),
            cost=self.costs.of(plan),
        )


def check_widths(widths: Widths, choices: StepChoices, *, float_state: bool = False) -> None:
    """Refuse tensors of 4 bits that a caller has given more, by their group or as a state in float32.

    Raises
    ------
    PlanError
        With a tensor and what gives it more bits.
    """
    groups, _ = _start((*widths.value_groups, KEY), choices)
    given = {name: f"{WIDE_BITS} bits" for group in groups for name in widths.groups[group]}
    given |= dict.fromkeys(widths.carried, FLOAT32.name) if float_state else {}
    for name in sorted(widths.int4.intersection(given)):
        raise PlanError(
            f"int4 gives {name!r} 4 bits, but another option gives it {given[name]}; leave one of them out"
        )


def _start(groups: tuple[str, ...], choices: StepChoices) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the groups that are wide from the start, and those whose width the caller has fixed."""
    if choices.all_wide:
        return groups, groups
    own = {STATE: choices.state_bits}
    if choices.reads_narrow:
        own[READ_STATE] = NARROW_BITS
    bits = {group: own.get(group, choices.value_bits) for group in groups[:-1]}
    wide = tuple(group for group, wanted in bits.items() if wanted == WIDE_BITS)
    return wide, tuple(group for group, wanted in bits.items() if wanted != AUTO)


def _gain(wider: Candidate, narrower: Candidate) -> float:
    """Noise that is removed for a unit of cost."""
    return (narrower.noise - wider.noise) / max(1.0, wider.cost - narrower.cost)


def _scalings(layer: Layer, choices: StepChoices) -> Iterator[Scaling]:
    size = layer.observed.largest[VALUE].shape[-1]
    if choices.rotated:
        yield Scaling("rotated", ValueChannels(exponents=((0,) * size,), rotated=True))
        return
    if choices.equalize is not True:
        yield Scaling("as they are", None)
    if choices.equalize is not False:
        known = layer.observed.largest
        for tensors in EQUALIZED:
            names = [name for name in tensors if name in known]
            exponents = value_exponents(layer.observed, names)
            yield Scaling(f"scaled by {', '.join(names)}", ValueChannels(exponents=exponents))


def _reason(candidate: Candidate, choice: StepChoice) -> str:
    best = choice.best
    wide = " and ".join(candidate.widened) or "no group"
    what = f"{wide} wide, channels {candidate.scaling.name}, ranges by {candidate.ranges}"
    reached = f"o has {candidate.sqnr_o_db:.1f} dB and the state {candidate.sqnr_state_db:.1f} dB"
    if candidate.cost > best.cost:
        return f"{what}: it costs {candidate.cost / best.cost:.2f} times as much ({reached})"
    return f"{what}: {reached}"
