"""`qinvert.calibrate`: one pass over the data, one plan for every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from os import PathLike
from typing import Any, TypeVar

import torch

from qinvert.calibration.choices import (
    HARDWARE_LOSS_DB,
    MAX_LOSS_DB,
    MIN_SQNR_DB,
    Granularity,
    RangeRule,
    ScaleRule,
    format_of,
)
from qinvert.calibration.data.token_data import with_options
from qinvert.calibration.model_identity import MODEL, model_identity, versions
from qinvert.calibration.observation.data_record import DataRecord
from qinvert.calibration.observation.held_out import held_out
from qinvert.calibration.observation.one_pass import Progress, observe
from qinvert.calibration.observation.statistics import LayerObserver
from qinvert.calibration.output_goals import (
    ANY_LOSS_DB,
    SEQUENCES,
    START_DB,
    OutputGoals,
    reach,
    summary_of,
    with_facts,
)
from qinvert.calibration.plan_warnings import warn_beyond_reach, warn_of
from qinvert.calibration.planning.candidates import candidate_programs
from qinvert.calibration.planning.costs import Costs, Measure, costs_for
from qinvert.calibration.planning.explanation import explain
from qinvert.calibration.planning.extent import check_extent
from qinvert.calibration.planning.grids import GridRules
from qinvert.calibration.planning.planner import Candidate, Goals, choose, weighed
from qinvert.calibration.planning.unseen import unseen_facts
from qinvert.checks import check_decibels, check_seed
from qinvert.errors import PlanError, ProgramError
from qinvert.formats import INT4, INT8, INT8X2, INT16, IntFormat
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantization import Requantize
from qinvert.profiles import Profile
from qinvert.program.program import Program

E = TypeVar("E", bound=StrEnum)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """The checked arguments of `calibrate` that choose grids."""

    profile: Profile
    costs: Costs
    ladder: tuple[IntFormat, ...]
    rules: GridRules
    goals: Goals


def calibrate(
    source: Any,
    data: Any = None,
    *,
    method: str | Program = "auto",
    bits: int | str = "auto",
    target: str | None = None,
    hardware: str | None = None,
    batch: int = 8,
    measure: Measure | None = None,
    min_sqnr_db: float | None = None,
    min_output_sqnr_db: float | None = None,
    max_kl: float | None = None,
    max_loss_db: float | None = None,
    scales: str = "auto",
    ranges: str = "auto",
    granularity: str = "tensor",
    factored: bool = False,
    seed: int = 0,
    num_samples: int | None = None,
    seq_len: int | None = None,
    progress: Progress | None = None,
    checkpoint: str | PathLike[str] | None = None,
) -> Plan:
    """Measure the ranges of every tensor and return an integer plan per layer.

    This takes one pass over ``source``, and memory does not grow with its length.
    Matrices that are all zero, as padding gives them, do not count.
    Under torchrun, with torch's process group initialized, every process must
    call this with the same arguments.  Each process runs its share of the
    batches, and all return the plan that one process would make.

    Parameters
    ----------
    source, data
        Where L comes from; see `qinvert.calibration.sources.open_source`.
    method : str or Program
        ``"auto"`` predicts the noise and cost of every candidate.  It takes the
        cheapest one that should reach both goals, and checks it by simulation on
        a sample of each layer.  With the name of a method only its arguments are
        chosen, with a program nothing is.
    bits : {"auto", 4, 8, 16, "8x2"}
        Format of every tensor; ``"auto"`` starts from 8 bits and widens the
        grids that add the most noise for their cost, as far as the target allows.
    target : str, optional
        Export profile to plan for, see `qinvert.profiles`; by default
        ``npu-qdq-int8``, or the first profile that takes ``bits``; with
        ``hardware`` the profile of that chip that holds the plan.
    hardware : str, optional
        Chip whose costs candidates are compared by, see `qinvert.hardware`;
        that of the target if left out.
    batch : int
        Matrices per call of the graph, for costs on ``hardware``.
    measure : callable, optional
        Such as `qinvert.compiled_cost("hexagon-v81")`: the few cheapest candidates
        that reach the goals are compiled, and the compiler's cycles decide.
    min_sqnr_db : float, optional
        Goal for each layer's sqnr: 20 dB by default, where neither of the next two is given.
    min_output_sqnr_db : float, optional
        Goal for the output of each layer of a model, ``20 log10(||o|| / ||o_hat - o||)``, as
        `qinvert.evaluate` measures it, here on the first sequences of the data.
    max_kl : float, optional
        Goal for the whole model: largest mean KL(exact || plan) of the logits, nats per token.
        Layers are planned for as little as these goals take.
    max_loss_db : float, optional
        How far below the floor of its own grids a plan of 8 bits or less may
        stay before ``auto`` prefers a costlier one: 1 dB by default, and 3 dB
        where ``hardware`` is named, since there every decibel has its price.  Where only
        outputs have goals there is no such limit.
    scales : {"auto", "float", "pow2"}
        Which scales are allowed: any float32, or powers of two only.
        ``"auto"`` means float, unless the target takes powers of two only.
    ranges : {"auto", "max", "percentile", "mse"}
        What a grid covers: all values seen, all but one in 10,000, or the
        range with the least mean square error.  Values beyond it saturate.
        ``"auto"`` means ``"mse"`` for int4, whose steps cost more than what
        saturates, and ``"max"`` for wider grids.
    granularity : {"tensor", "head"}
        One set of grids per layer, or one per head.  With one per head the plan
        has an entry ``LAYER/head_H`` for each head, and L must have the axes
        ``(..., heads, chunks, C, C)``.
    factored : bool
        Plan the form that takes beta as a separate input, see
        `qinvert.block_merge`.  The source must provide beta, as models do.
    seed : int
        Seed of the sample and of the choice of sequences.
    num_samples, seq_len : int, optional
        How many sequences of ``data`` to read, and how many tokens each of
        them has; see `qinvert.TokenData`.
    progress : callable, optional
        Called as ``progress(layer, matrices)`` after every batch.
    checkpoint : path, optional
        File in which statistics are saved from time to time, and at the end.
        If it exists, calibration continues from it, and ends in the same plan.
        The same data must be passed again, from its start, but the batches that
        were seen do not go through the model again.  Goals, bits and scales may
        be other ones than in the first run; name the target where bits differ,
        because methods offer other programs to targets whose costs are a chip's.

    Returns
    -------
    Plan
        A layer that misses a goal has ``provenance["meets_goal"] == False``
        and says in ``provenance["fix"]`` what would change that.  ``provenance["unseen"]``
        has the sqnr on matrices that nothing was chosen on, with an interval and the
        errors of every head.

    Warns
    -----
    MissedGoalWarning
        If a layer, or a head that carries signal, misses a goal, and before any work if the
        types of the target cannot reach it.
    DataWarning
        If the data is too small for what it holds.

    Raises
    ------
    InputError
        If the source or one of its matrices is not legal or lacks beta, or if
        the checkpoint was made from another model, other data or options.
    PlanError
        If an option is not legal, or the target does not take the format.
    ProgramError
        If the method is unknown, has no factored form, or has another chunk
        size than the data.
    """
    outputs = OutputGoals(min_output_sqnr_db=min_output_sqnr_db, max_kl=max_kl)
    outputs.check_source(source)
    if outputs.given and max_loss_db is None and min_sqnr_db is None:
        max_loss_db = ANY_LOSS_DB
    start_db = MIN_SQNR_DB if not outputs.given else START_DB
    goal_db = start_db if min_sqnr_db is None else min_sqnr_db
    options = _options(
        bits, scales, ranges, goal_db, max_loss_db, costs_for(target, hardware, bits, batch, measure)
    )
    check_seed(seed, PlanError)
    warn_beyond_reach(options.goals.min_sqnr_db, options.profile, options.ladder)
    grain = _member(Granularity, "granularity", granularity)
    record = DataRecord(SEQUENCES if outputs.given else 0)
    observers = observe(
        source,
        with_options(data, num_samples, seq_len, seed),
        lambda chunk: _programs(method, chunk, factored, options),
        granularity=grain,
        seed=seed,
        progress=progress,
        checkpoint=checkpoint,
        record=record,
    )
    for layer, observer in observers.items():
        record.check(observer.chunk)
        check_extent(layer, observer.sampled)
    planning = _Planning(observers, options, record.sequences > 0)
    if outputs.given:
        reached = reach(source, record.first, list(observers), outputs, planning.plan, goal_db)
        layers = with_facts(reached, min_sqnr_db)
    else:
        reached, layers = None, {name: planning.plan(name, goal_db) for name in observers}
    costs = options.costs
    provenance = {
        "method": method if isinstance(method, str) else method.title,
        "bits": str(bits),
        "scales": str(options.rules.scales),
        "ranges": str(options.rules.ranges),
        "granularity": str(grain),
        "min_sqnr_db": options.goals.min_sqnr_db,
        "max_loss_db": options.goals.max_loss_db,
        "seed": seed,
        **costs.provenance,
        **({"factored": True} if factored else {}),
        **({} if reached is None else summary_of(reached, outputs)),
        **record.provenance,
        **({MODEL: model_identity(source, layers)} if isinstance(source, torch.nn.Module) else {}),
        "versions": versions(),
    }
    plan = Plan(layers=layers, target=costs.target_of(layers.values()), provenance=provenance)
    warn_of(plan)
    return plan


class _Planning:
    """Plans layers for goals; what candidates measure of themselves is kept from goal to goal."""

    def __init__(self, observers: Mapping[str, LayerObserver], options: _Options, of_model: bool) -> None:
        self._observers, self._options, self._of_model = observers, options, of_model
        self._candidates: dict[str, list[Candidate]] = {}

    def plan(self, name: str, goal_db: float) -> LayerPlan:
        """Return the plan of one entry for a goal of T."""
        options, observer = self._options, self._observers[name]
        if name not in self._candidates:
            self._candidates[name] = weighed(observer, options.ladder, options.rules, options.costs)
        goals = replace(options.goals, min_sqnr_db=goal_db)
        return _plan_layer(observer, replace(options, goals=goals), self._of_model, self._candidates[name])


def _plan_layer(
    observer: LayerObserver, options: _Options, of_model: bool, candidates: Sequence[Candidate]
) -> LayerPlan:
    sample = observer.sampled
    costs = options.costs
    choice = choose(observer, options.ladder, options.rules, options.goals, costs, candidates)
    program = choice.best.plan.program
    free = replace(options.rules, requantize=Requantize.DIVIDE)
    wider = [
        Candidate(
            program, observer.ranges(program), sample, (fmt,), free, costs.of, choice.best.candidate.truth
        )
        for fmt in (INT8, INT8X2, INT16)
    ]
    provenance = {
        "matrices": observer.matrices,
        "observed": observer.observed,
        "sample": sample.count,
        **costs.chains(choice.best.plan, choice.best.compiled),
        **explain(choice, wider, held_out(observer.sample, observer.held)),
        **unseen_facts(choice.best.plan, observer, options.goals.min_sqnr_db, of_model),
    }
    return replace(choice.best.plan, provenance=provenance)


def _programs(method: str | Program, chunk: int, factored: bool, options: _Options) -> list[Program]:
    if isinstance(method, Program):
        if method.chunk != chunk:
            raise ProgramError(
                f"{method.title} is for {method.chunk} x {method.chunk} matrices, but the data has "
                f"{chunk} x {chunk}; build the program for that chunk size"
            )
        if factored and not method.inverse_ports.factored:
            raise ProgramError(f"{method.title} does not take beta; build it with factored=True")
        return [method]
    requantize, on_chips = options.profile.requantize, options.costs.hardware is not None
    return candidate_programs(method, chunk, factored, requantize, on_chips)


def _options(
    bits: int | str,
    scales: str,
    ranges: str,
    min_sqnr_db: float,
    max_loss_db: float | None,
    costs: Costs,
) -> _Options:
    profile = costs.profile
    ladder = _ladder(bits, profile)
    if max_loss_db is None:
        max_loss_db = HARDWARE_LOSS_DB if costs.named else MAX_LOSS_DB
    return _Options(
        profile=profile,
        costs=costs,
        ladder=ladder,
        rules=GridRules(
            scales=_scale_rule(scales, profile),
            ranges=_range_rule(ranges, ladder),
            requantize=profile.requantize,
            folds=profile.quantized_everywhere,
        ),
        goals=Goals(
            min_sqnr_db=check_decibels("min_sqnr_db", min_sqnr_db, PlanError),
            max_loss_db=check_decibels("max_loss_db", max_loss_db, PlanError),
        ),
    )


def _scale_rule(scales: str, profile: Profile) -> ScaleRule:
    needed = ScaleRule.POW2 if profile.power_of_two_scales else ScaleRule.FLOAT
    if scales == "auto":
        return needed
    if scales not in list(ScaleRule):
        raise PlanError(f"scales {scales!r} is unknown; use {_alternatives(['auto', *ScaleRule])}")
    if needed is ScaleRule.POW2 and scales == ScaleRule.FLOAT:
        raise PlanError(
            f"target {profile.name!r} takes power-of-two scales only, not scales={str(scales)!r}; "
            "use scales='pow2' or another target"
        )
    return ScaleRule(scales)


def _range_rule(ranges: str, ladder: tuple[IntFormat, ...]) -> RangeRule:
    if ranges == "auto":
        return RangeRule.MSE if ladder[0] == INT4 else RangeRule.MAX
    if ranges not in list(RangeRule):
        raise PlanError(f"ranges {ranges!r} is unknown; use {_alternatives(['auto', *RangeRule])}")
    return RangeRule(ranges)


def _ladder(bits: int | str, profile: Profile) -> tuple[IntFormat, ...]:
    if str(bits) == "auto":
        # int4 lies in int8 containers: no target multiplies it faster.
        wide = [fmt for fmt in profile.formats if fmt != INT4]
        return tuple(sorted(wide, key=lambda fmt: fmt.largest)) or profile.formats[:1]
    fmt = format_of(bits, profile)
    if fmt not in profile.formats:
        names = ", ".join(f.name for f in profile.formats)
        raise PlanError(
            f"target {profile.name!r} takes {names}, not {fmt}; choose other bits or another target"
        )
    return (fmt,)


def _member(kind: type[E], name: str, value: str) -> E:
    try:
        return kind(value)
    except ValueError:
        raise PlanError(f"{name} {value!r} is unknown; use {_alternatives(list(kind))}") from None


def _alternatives(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
