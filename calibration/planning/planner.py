"""Chooses a program, and a format for every grid, from predicted noise and cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, TypeAlias

import torch

from qinvert.calibration.observation.statistics import LayerObserver
from qinvert.calibration.planning.candidates import measure
from qinvert.calibration.planning.costs import Compiled, Costs
from qinvert.calibration.planning.grids import GridRules, Grids, choose_grids, growth
from qinvert.calibration.planning.reasons import ALIKE, floor_reason, growth_reason, lack_reason
from qinvert.calibration.planning.scales import scale_groups
from qinvert.calibration.planning.sensitivity import LayerGrids, Sensitivities, measure_together
from qinvert.formats import INT8, IntFormat
from qinvert.plan.cost import plan_cost
from qinvert.plan.plan import LayerPlan
from qinvert.program.own_grids import COPY, narrow_parts, with_own_grids
from qinvert.program.program import Program
from qinvert.progress import track
from qinvert.systems import Systems

#: Programs whose powers outgrow both M and T by more than this are passed over: unseen data
#: would decide whether they saturate.
MAX_GROWTH: Final = 1.0
#: Candidates that are compiled where a compiler decides.
COMPILED: Final = 4
#: Candidates that are simulated where none reaches the goals.
LAST_RESORT: Final = 3
#: Times that a format is raised after a simulation fell short of its prediction.
RETRIES: Final = 3
#: A plan that exceeds its goal by more than this may have a cheaper one below it.
STEP_DB: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Goals:
    """What a plan should reach on the sample."""

    #: Smallest sqnr of a layer.
    min_sqnr_db: float
    #: Largest distance to the floor of the same input and output grids, where those are
    #: of 8 bits or less: with more bits there are decibels to spare.
    max_loss_db: float


#: What a plan costs on its target.
Costing: TypeAlias = Callable[[LayerPlan], float]


class Candidate:
    """One program on one layer: noise by grid and format, predictions, plans."""

    def __init__(
        self,
        program: Program,
        ranges: Mapping[str, float],
        sample: Systems,
        ladder: Sequence[IntFormat],
        rules: GridRules,
        costing: Costing = plan_cost,
        truth: torch.Tensor | None = None,
    ) -> None:
        self.program = program
        self.growth = growth(program, ranges)
        self.groups = scale_groups(program)
        self.ladder = ladder
        #: Exact inverses of the sample; candidates of one layer share them.
        self.truth = sample.inverse() if truth is None else truth
        self._ranges, self._sample, self._rules = ranges, sample, rules
        self._costing = costing
        self._known: dict[tuple[IntFormat, ...], Grids] = {}
        self._sensitivities: Sensitivities | None = None

    @property
    def sensitivities(self) -> Sensitivities:
        """Noise of every grid under every format of the ladder."""
        if self._sensitivities is None:
            (self._sensitivities,) = measure_together(self.program, [self.layer_grids])
        return self._sensitivities

    def know(self, sensitivities: Sensitivities) -> None:
        """Take over what was measured for this candidate together with others."""
        self._sensitivities = sensitivities

    @property
    def layer_grids(self) -> LayerGrids:
        """What its sensitivities are measured with."""
        grids = {fmt: self._grids(self.uniform(fmt)) for fmt in self.ladder}
        return LayerGrids(
            grids=[found.tensors for found in grids.values()],
            sample=self._sample,
            truth=self.truth,
            requantize={fmt.name: found.requantize for fmt, found in grids.items()},
        )

    def uniform(self, fmt: IntFormat) -> dict[str, IntFormat]:
        """One format for every group of tensors that share a grid."""
        return dict.fromkeys(self.groups.values(), fmt)

    def _grids(self, formats: Mapping[str, IntFormat]) -> Grids:
        key = tuple(formats.values())
        if key not in self._known:
            by_tensor = {name: formats[group] for name, group in self.groups.items()}
            self._known[key] = choose_grids(self.program, self._ranges, self._sample, by_tensor, self._rules)
        return self._known[key]

    @cached_property
    def finer(self) -> list[Candidate]:
        """The same computation with more grids: steps between two plans of this one."""
        return [self._finer(parts) for parts in narrow_parts(self.program)]

    def _finer(self, parts: Sequence[str]) -> Candidate:
        # A copy holds what its tensor holds, so that nothing must be observed again.
        ranges = {**self._ranges, **{name + COPY: self._ranges[name] for name in parts}}
        program = with_own_grids(self.program, parts)
        return Candidate(program, ranges, self._sample, self.ladder, self._rules, self._costing, self.truth)

    def on(self, fmt: IntFormat, rules: GridRules) -> Candidate:
        """Return the same program on one format, under other rules."""
        return Candidate(self.program, self._ranges, self._sample, (fmt,), rules, self._costing, self.truth)

    def plan(self, formats: Mapping[str, IntFormat]) -> LayerPlan:
        """Return the plan under a format for every group."""
        grids = self._grids(formats)
        return LayerPlan(
            program=self.program,
            tensors=grids.tensors,
            requantize=grids.requantize,
            ranges={name: finite(value) for name, value in grids.ranges.items()},
        )

    def predict(self, formats: Mapping[str, IntFormat]) -> Prediction:
        """Return what these formats should reach and cost."""
        noise = self.sensitivities
        plan = self.plan(formats)
        return Prediction(
            candidate=self,
            formats=formats,
            plan=plan,
            cost=self._costing(plan),
            sqnr_db=noise.sqnr_db(formats),
            floor_db=noise.floor_db(formats),
        )

    def cheapest(self, goals: Goals, extra_db: float = 0.0) -> Prediction:
        """Raise formats until the goals should be met, first those that take off the most noise per cost.

        Parameters
        ----------
        goals : Goals
        extra_db : float
            By how much a simulation fell short of its prediction before; the
            prediction must exceed the goals by as much.
        """
        prediction = self.predict(self.uniform(self.ladder[0]))
        while prediction.shortfall(goals) + extra_db > 0:
            raised = [self.predict(formats) for formats in self._raised(prediction.formats)]
            if not raised:
                break
            prediction = max(raised, key=lambda p: _gain(prediction, p))
        return self._cheaper(prediction, goals, extra_db)

    def _cheaper(self, found: Prediction, goals: Goals, extra_db: float) -> Prediction:
        """Return ``found``, or one format everywhere if that also reaches the goals and costs less."""
        # On some chips the conversions between two formats cost more than the bits that they save.
        if found.formats == self.uniform(self.ladder[0]):
            return found
        alike = [self.predict(self.uniform(fmt)) for fmt in self.ladder[1:]]
        reaching = [p for p in (found, *alike) if p.shortfall(goals) + extra_db <= 0]
        return min(reaching, key=lambda p: p.cost, default=found)

    @property
    def narrowest_cost(self) -> float:
        """Cost with the narrowest format everywhere: no plan of this program costs less on a CPU."""
        return self._costing(self.plan(self.uniform(self.ladder[0])))

    def _raised(self, formats: Mapping[str, IntFormat]) -> list[dict[str, IntFormat]]:
        wider = dict(zip(self.ladder, self.ladder[1:], strict=False))
        return [{**formats, group: wider[fmt]} for group, fmt in formats.items() if fmt in wider]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A candidate under one choice of formats."""

    candidate: Candidate
    #: Format of every group of tensors that share a grid.
    formats: Mapping[str, IntFormat]
    plan: LayerPlan
    #: In the unit of the target's costs.
    cost: float
    #: From the noise of the grids, each measured by itself.
    sqnr_db: float
    #: The same for the input and output grids alone.
    floor_db: float
    #: By simulation on the whole sample; None if not simulated.
    simulated: tuple[float, float] | None = None
    #: By the target's compiler; None if not compiled.
    compiled: Compiled | None = None

    @property
    def known_cost(self) -> float:
        """Cost by the compiler, if it was asked."""
        return self.cost if self.compiled is None else self.compiled.cost

    def check(self, sample: Systems) -> Prediction:
        """Return the prediction with what a simulation of the plan really reaches."""
        achieved, floor = measure(self.plan, sample, self.candidate.truth)
        return replace(self, simulated=(achieved.sqnr_db, floor.sqnr_db))

    @property
    def best_known(self) -> tuple[float, float]:
        """(sqnr_db, floor_db), simulated if possible."""
        return self.simulated or (self.sqnr_db, self.floor_db)

    def shortfall(self, goals: Goals) -> float:
        """Decibels that are missing to the farther goal; 0 or less where both are reached."""
        sqnr_db, floor_db = self.best_known
        output = self.plan.output.format
        if output.planes * output.container_bits > INT8.container_bits or not math.isfinite(floor_db):
            return goals.min_sqnr_db - sqnr_db
        return max(goals.min_sqnr_db - sqnr_db, floor_db - sqnr_db - goals.max_loss_db)

    @property
    def binding(self) -> tuple[str, float]:
        """The grid that adds the most noise, and its share."""
        return next(iter(self.candidate.sensitivities.shares(self.formats).items()))

    def reason(self, goals: Goals) -> str:
        """Say why it was not chosen, in words for people."""
        sqnr_db, floor_db = self.best_known
        kind = "simulated" if self.simulated else "predicted"
        if sqnr_db < goals.min_sqnr_db:
            words = lack_reason(sqnr_db, goals.min_sqnr_db)
        elif self.shortfall(goals) > 0:
            words = floor_reason(floor_db - sqnr_db, goals.max_loss_db)
        else:
            words = ALIKE
        return f"{self.plan.program.title}: {words}; {kind} sqnr {sqnr_db:.1f} dB"


def _gain(before: Prediction, after: Prediction) -> float:
    """Noise that goes away, per cost that is added."""
    sensitivities = before.candidate.sensitivities
    old, new = (sensitivities.total(p.formats) for p in (before, after))
    return (old - new) / max(1, after.cost - before.cost)


def finite(value: float) -> float:
    """Clamp infinities to what JSON can hold; NaN, a noise beyond float64, is the worst of all."""
    return -3.4e38 if math.isnan(value) else max(-3.4e38, min(3.4e38, value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The outcome for one layer: what was chosen and what was not."""

    best: Prediction
    goals: Goals
    #: Every prediction, cheapest first.
    predictions: tuple[Prediction, ...]
    #: Candidates that were passed over without a prediction, with the reason.
    passed_over: tuple[str, ...]

    @property
    def meets_goal(self) -> bool:
        """Whether the simulated plan reaches ``min_sqnr_db`` on the sample."""
        return self.best.best_known[0] >= self.goals.min_sqnr_db


def weighed(
    observer: LayerObserver, ladder: Sequence[IntFormat], rules: GridRules, costs: Costs | None = None
) -> list[Candidate]:
    """Return every program of an observer as a candidate, which measures itself once for all goals."""
    sample = observer.sampled
    truth = sample.inverse()
    costing = plan_cost if costs is None else costs.of
    return [
        Candidate(p, observer.ranges(p), sample, ladder, rules, costing, truth) for p in observer.programs
    ]


def considered(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates whose powers do not outgrow M and T, or the one whose powers grow least."""
    return [c for c in candidates if c.growth <= MAX_GROWTH] or [min(candidates, key=lambda c: c.growth)]


def choose(
    observer: LayerObserver,
    ladder: Sequence[IntFormat],
    rules: GridRules,
    goals: Goals,
    costs: Costs | None = None,
    candidates: Sequence[Candidate] | None = None,
) -> Choice:
    """Return the cheapest candidate that reaches the goals in simulation, or the best one.

    Candidates are taken in the order of their cost; each that should reach
    the goals is simulated on the sample, with wider formats if it falls short.
    Without ``costs`` they are those of `qinvert.plan.cost`.  Where they have a
    compiler, the first `COMPILED` that reach the goals are compiled, and its
    cycles decide.  ``candidates`` are those of `weighed`, where a caller has them already.
    """
    sample = observer.sampled
    if candidates is None:
        candidates = weighed(observer, ladder, rules, costs)
    slow = considered(candidates)
    predictions = _in_steps(
        sorted((c.cheapest(goals) for c in track(slow, "candidates", len(slow))), key=lambda p: p.cost), goals
    )
    checked: list[Prediction] = []
    wanted = COMPILED if costs is not None and costs.measure else 1
    for prediction in predictions:
        if _enough(checked, prediction, wanted, goals):
            break
        if prediction.shortfall(goals) <= 0:
            found = _stepped_up(prediction, sample, goals)
            reached = found.shortfall(goals) <= 0
            compiled = costs.measured(found.plan) if costs is not None and reached else None
            checked.append(replace(found, compiled=compiled))
    if not any(p.shortfall(goals) <= 0 for p in checked):
        seen = [p.candidate for p in checked]
        rest = [p for p in predictions if p.candidate not in seen]
        rest = sorted(rest, key=lambda p: p.shortfall(goals))[:LAST_RESORT]
        checked += [p.check(sample) for p in rest]
    best = min(checked, key=lambda p: (max(0.0, p.shortfall(goals)), p.known_cost))
    known = {p.candidate: p for p in checked}
    return Choice(
        best=best,
        goals=goals,
        predictions=tuple(known.get(p.candidate, p) for p in predictions),
        passed_over=tuple(
            f"{c.program.title}: {growth_reason(c.growth, c.ladder[0])}"
            for c in candidates
            if c.growth > MAX_GROWTH and c is not best.candidate
        ),
    )


def _in_steps(predictions: list[Prediction], goals: Goals) -> list[Prediction]:
    """Return the predictions, cheapest first, with finer candidates where the goal asks for them.

    It asks where the cheapest plan on the narrowest format does not reach them, and the cheapest
    plan that does exceeds ``min_sqnr_db`` by more than `STEP_DB`: there may be one between the two.
    """
    first = next((p for p in predictions if p.shortfall(goals) <= 0), None)
    if first is None or first.sqnr_db - goals.min_sqnr_db <= STEP_DB:
        return predictions
    if first is predictions[0] and first.formats == first.candidate.uniform(first.candidate.ladder[0]):
        return predictions
    finer = [f for p in predictions if p.shortfall(goals) <= 0 for f in p.candidate.finer]
    found = [f.cheapest(goals) for f in finer if f.narrowest_cost < first.cost]
    return sorted([*predictions, *(p for p in found if p.cost < first.cost)], key=lambda p: p.cost)


def _enough(checked: Sequence[Prediction], following: Prediction, wanted: int, goals: Goals) -> bool:
    """Whether ``wanted`` plans reach the goals in simulation, one of them for no more than what follows.

    A plan whose formats were raised after its simulation may cost more than candidates behind it.
    """
    costs = [p.cost for p in checked if p.shortfall(goals) <= 0]
    return len(costs) >= wanted and (wanted > 1 or min(costs) <= following.cost)


def _stepped_up(prediction: Prediction, sample: Systems, goals: Goals) -> Prediction:
    checked, extra_db = prediction.check(sample), 0.0
    for _ in range(RETRIES):
        if checked.shortfall(goals) <= 0:
            break
        predicted = replace(checked, simulated=None)
        extra_db = max(extra_db, checked.shortfall(goals) - predicted.shortfall(goals))
        wider = prediction.candidate.cheapest(goals, extra_db)
        if wider.formats == checked.formats:
            break
        checked = wider.check(sample)
    return checked
