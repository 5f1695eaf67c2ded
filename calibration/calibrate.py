"""`qinvert.calibrate`: one pass over the data, one plan for every layer."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch

from qinvert.calibration.choices import MIN_SQNR_DB, Granularity
from qinvert.calibration.chunk_steps.calibrate_steps import StepCalibration, step_calibration
from qinvert.calibration.chunk_steps.options import ChunkOptions, Scope
from qinvert.calibration.data.token_data import with_options
from qinvert.calibration.grid_options import GridOptions, grid_options
from qinvert.calibration.head_splits import check_judged, plan_by_need
from qinvert.calibration.inverse_planning import InversePlanning, candidates_of
from qinvert.calibration.model_identity import MODEL, model_identity, versions
from qinvert.calibration.observation.data_record import DataRecord
from qinvert.calibration.observation.one_pass import Progress, observe
from qinvert.calibration.output_goals import (
    ANY_LOSS_DB,
    SEQUENCES,
    START_DB,
    OutputGoals,
    reach,
    summary_of,
    with_facts,
)
from qinvert.calibration.plan_warnings import warn_beyond_reach, warned
from qinvert.calibration.planning.costs import Measure, costs_for
from qinvert.calibration.planning.extent import check_extent
from qinvert.calibration.planning.unseen import TRY_AUTO, TRY_HEADS
from qinvert.checks import check_member, check_seed
from qinvert.errors import PlanError
from qinvert.plan.plan import Plan
from qinvert.pretrained import opened
from qinvert.program.program import Program


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
    scope: str = "inverse",
    chunk: ChunkOptions | None = None,
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
    granularity : {"tensor", "head", "auto"}
        One set of grids per layer, or one per head.  With one per head the plan
        has an entry ``LAYER/head_H`` for each head, and L must have the axes
        ``(..., heads, chunks, C, C)``.  ``"auto"`` observes both, plans whole layers, and
        splits those of which a head that carries signal misses the goal on unseen matrices,
        where that helps, see `qinvert.calibration.head_splits`.
    factored : bool
        Plan the form that takes beta as a separate input, see
        `qinvert.block_merge`.  The source must provide beta, as models do.
    scope : {"inverse", "chunk"}
        Whether a plan holds T alone, or the whole chunk step of a model's layers: decays, products
        of keys, T, outputs and the state that goes from chunk to chunk, see
        `qinvert.gated_delta_step`.  The goal is then that of the step's output and of its state
        on a sample, free-running, and ``bits="auto"`` gives more than 8 bits to the groups of
        tensors that gain the most for their cost.  T alone is the default of models, too: it is
        what `qinvert.graft`, `qinvert.export_model` and other tools put in the place of an inverse.
    chunk : ChunkOptions, optional
        Options of ``scope="chunk"``, which takes neither ``factored``, ``max_loss_db``, ``measure`` nor
        ``checkpoint``.
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
    source = opened(source)
    outputs = OutputGoals(min_output_sqnr_db=min_output_sqnr_db, max_kl=max_kl)
    outputs.check_source(source)
    if outputs.given and max_loss_db is None and min_sqnr_db is None:
        loss_db: float | None = ANY_LOSS_DB
    else:
        loss_db = max_loss_db
    start_db = MIN_SQNR_DB if not outputs.given else START_DB
    goal_db = start_db if min_sqnr_db is None else min_sqnr_db
    whole_steps = check_member(Scope, "scope", scope, PlanError) is Scope.CHUNK
    costs = costs_for(target, hardware, bits, batch, measure, steps=whole_steps)
    options = grid_options(bits, scales, ranges, goal_db, loss_db, costs)
    check_seed(seed, PlanError)
    grain = check_member(Granularity, "granularity", granularity, PlanError)
    if grain is Granularity.AUTO:
        check_judged(scope, outputs)
    given = with_options(data, num_samples, seq_len, seed)
    facts = _provenance(method, bits, grain, options, seed)
    if whole_steps:
        _check_chunk_options(factored, checkpoint, max_loss_db, measure)
        calibration = _step_calibration(method, bits, ranges, options, grain, chunk or ChunkOptions())
        steps, seen = calibration.run(source, given, progress, outputs)
        # A step has no floor to stay near, and rules of its own for ranges.
        facts |= {"scope": scope, "ranges": ranges, **seen}
        facts |= {MODEL: model_identity(source, steps), "versions": versions()}
        del facts["max_loss_db"]
        return warned(Plan(layers=steps, target=options.costs.target_of(steps.values()), provenance=facts))
    if chunk is not None:
        raise PlanError("chunk=ChunkOptions(...) goes with scope='chunk'; leave it out, or pass that scope")
    warn_beyond_reach(options.goals.min_sqnr_db, options.profile, options.ladder)
    record = DataRecord(SEQUENCES if outputs.given else 0)
    observers = observe(
        source,
        given,
        lambda chunk: candidates_of(method, chunk, factored, options),
        granularity=grain,
        seed=seed,
        progress=progress,
        checkpoint=checkpoint,
        record=record,
    )
    for layer, observer in observers.items():
        record.check(observer.chunk)
        check_extent(layer, observer.sampled)
    remedy = TRY_HEADS if outputs.given else TRY_AUTO
    planning = InversePlanning(observers, options, record.sequences > 0, remedy)
    if outputs.given:
        reached = reach(source, record.first, list(observers), outputs, planning.plan, goal_db)
        layers = with_facts(reached, min_sqnr_db)
    else:
        plan_entries = plan_by_need if grain is Granularity.AUTO else InversePlanning.plan_all
        reached, layers = None, plan_entries(planning, goal_db)
    facts |= {
        **({"factored": True} if factored else {}),
        **({} if reached is None else summary_of(reached, outputs)),
        **record.provenance,
        **({MODEL: model_identity(source, layers)} if isinstance(source, torch.nn.Module) else {}),
        "versions": versions(),
    }
    return warned(Plan(layers=layers, target=options.costs.target_of(layers.values()), provenance=facts))


def _provenance(
    method: str | Program, bits: int | str, grain: Granularity, options: GridOptions, seed: int
) -> dict[str, Any]:
    return {
        "method": method if isinstance(method, str) else method.title,
        "bits": str(bits),
        "scales": str(options.rules.scales),
        "ranges": str(options.rules.ranges),
        "granularity": str(grain),
        "min_sqnr_db": options.goals.min_sqnr_db,
        "max_loss_db": options.goals.max_loss_db,
        "seed": seed,
        **options.costs.provenance,
    }


def _check_chunk_options(
    factored: bool, checkpoint: object, max_loss_db: float | None, measure: Measure | None
) -> None:
    given = {
        "factored": factored,
        "checkpoint": checkpoint is not None,
        "max_loss_db": max_loss_db is not None,
        "measure": measure is not None,
    }
    for name, passed in given.items():
        if passed:
            raise PlanError(f"{name} goes with scope='inverse'; leave it out with scope='chunk'")


def _step_calibration(
    method: str | Program,
    bits: int | str,
    ranges: str,
    options: GridOptions,
    grain: Granularity,
    chunk: ChunkOptions,
) -> StepCalibration:
    return step_calibration(
        method=method,
        narrowest=options.ladder[0],
        bits=str(bits),
        scales=options.rules.scales,
        ranges=ranges,
        min_sqnr_db=options.goals.min_sqnr_db,
        costs=options.costs,
        options=chunk,
        granularity=grain,
    )
