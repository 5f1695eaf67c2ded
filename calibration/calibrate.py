"""`qinvert.calibrate`: one pass over the data, one plan for every layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from qinvert.calibration.candidates import Candidate, auto_programs, plan_program, unproved
from qinvert.calibration.observers import LayerObserver, RangeObserver
from qinvert.calibration.scales import ScaleRule
from qinvert.calibration.sources import check_size, open_source
from qinvert.checks import check_decibels, check_seed
from qinvert.errors import PlanError, ProgramError
from qinvert.formats import INT4, INT8, IntFormat
from qinvert.methods import find_method
from qinvert.plan import LayerPlan, Plan
from qinvert.profiles import Profile, find_profile
from qinvert.program import Program
from qinvert.steps import INPUT

#: Called after every batch with the layer's name and the matrices seen so far.
Progress = Callable[[str, int], None]

#: Formats by what ``bits`` may be.
BITS: Final[dict[str, IntFormat]] = {"auto": INT8, "8": INT8, "4": INT4}
#: A method may lose this much against the floor before ``auto`` moves on.
MAX_LOSS_DB: Final = 1.0
#: ``auto`` passes over programs whose powers outgrow both M and T by more.
MAX_GROWTH: Final = 1.0
#: Matrices per layer that candidates are simulated on.
SAMPLE_SIZE: Final = 64


def calibrate(
    source: Any,
    data: Any = None,
    *,
    method: str | Program = "auto",
    bits: int | str = "auto",
    target: str = "npu-qdq-int8",
    min_sqnr_db: float = 20.0,
    max_loss_db: float = MAX_LOSS_DB,
    scales: str = "float",
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Measure the ranges of every tensor and return an integer plan per layer.

    One pass over ``source``; memory does not grow with it.

    Parameters
    ----------
    source, data
        Where L comes from; see `qinvert.calibration.sources.open_source`.
    method : str or Program
        ``"auto"`` takes the block merge with the fewest steps that reaches
        both goals on a sample of each layer, adding a residual correction
        where none does; a method's name or a program fixes it.
    bits : {"auto", 8, 4}
        Format of every tensor; ``"auto"`` is 8.
    target : str
        Export profile to plan for; see `qinvert.profiles`.
    min_sqnr_db : float
        Goal for each layer's sqnr.
    max_loss_db : float
        Goal for the distance to the floor of the same grids.
    scales : {"float", "pow2"}
        Any float32, or powers of two only.
    seed : int
        Of the sample.
    progress : callable, optional
        Called as ``progress(layer, matrices)`` after every batch.

    Returns
    -------
    Plan
        A layer that misses a goal has ``provenance["meets_goal"] == False``.

    Raises
    ------
    InputError
        If the source or one of its matrices is not legal.
    PlanError
        If an option is not legal, or the target does not take the format.
    ProgramError
        If the method is unknown, or its chunk size is not the data's.
    """
    profile = find_profile(target)
    fmt, rule = _find_bits(bits, profile), _find_rule(scales)
    goals = (
        check_decibels("min_sqnr_db", min_sqnr_db, PlanError),
        check_decibels("max_loss_db", max_loss_db, PlanError),
    )
    check_seed(seed, PlanError)
    observers: dict[str, LayerObserver] = {}
    for layer, lower in open_source(source, data):
        if layer not in observers:
            observers[layer] = LayerObserver(_programs(method, lower.shape[-1]), SAMPLE_SIZE, seed)
        check_size(lower, observers[layer].chunk, layer)
        observers[layer].update(lower)
        if progress is not None:
            progress(layer, observers[layer].matrices)
    layers = {layer: _choose(observer, fmt, rule, profile, goals) for layer, observer in observers.items()}
    provenance = {
        "method": method if isinstance(method, str) else method.title,
        "bits": str(bits),
        "scales": str(rule),
        "min_sqnr_db": goals[0],
        "max_loss_db": goals[1],
        "seed": seed,
    }
    return Plan(layers=layers, target=target, provenance=provenance)


def _choose(
    observer: LayerObserver, fmt: IntFormat, rule: ScaleRule, profile: Profile, goals: tuple[float, float]
) -> LayerPlan:
    sample = observer.sample.matrices
    slow_growing = [seen for seen in observer.ranges if growth(seen) <= MAX_GROWTH]
    tried: list[Candidate] = []
    for seen in slow_growing or [min(observer.ranges, key=growth)]:
        tried.append(plan_program(seen.program, seen.ranges, sample, fmt, rule, profile.requantize))
        if tried[-1].meets(*goals):
            break
    best = tried[-1] if tried[-1].meets(*goals) else max(tried, key=lambda c: (c.sqnr_db, -c.loss_db))
    provenance = {
        "matrices": observer.matrices,
        "sample": len(sample),
        "meets_goal": best.meets(*goals),
        "expected_sqnr_db": _finite(best.sqnr_db),
        "expected_floor_db": _finite(best.floor_db),
        "growth": _finite(next(growth(r) for r in observer.ranges if r.program is best.plan.program)),
        "rejected": [
            *(
                f"{r.program.title}: powers grow to {growth(r):.3g} times M and T"
                for r in observer.ranges
                if growth(r) > MAX_GROWTH and r.program is not best.plan.program
            ),
            *(str(candidate) for candidate in tried if candidate is not best),
        ],
    }
    ranges = {name: _finite(value) for name, value in best.plan.ranges.items()}
    return replace(best.plan, provenance=provenance, ranges=ranges)


def growth(observer: RangeObserver) -> float:
    """Return the largest tensor without a proved range, over the larger of max|M| and max|output|."""
    ranges = observer.ranges
    scale = max(ranges[INPUT], ranges[observer.program.output])
    largest = max((ranges[name] for name in unproved(observer.program)), default=0.0)
    if scale == 0 or largest == 0:
        return 0.0
    return largest / scale if math.isfinite(scale) else math.inf


def _finite(value: float) -> float:
    """Clamp infinities to what JSON can hold."""
    return max(-3.4e38, min(3.4e38, value))


def _programs(method: str | Program, chunk: int) -> list[Program]:
    if isinstance(method, Program):
        if method.chunk != chunk:
            raise ProgramError(
                f"{method.title} is for {method.chunk} x {method.chunk} matrices, the data has "
                f"{chunk} x {chunk}; build the program for that chunk"
            )
        return [method]
    return auto_programs(chunk) if method == "auto" else [find_method(method)(chunk)]


def _find_bits(bits: int | str, profile: Profile) -> IntFormat:
    fmt = BITS.get(str(bits))
    if fmt is None:
        raise PlanError(f"bits {bits!r} is not supported; use {', '.join(BITS)}")
    if fmt not in profile.formats:
        names = ", ".join(f.name for f in profile.formats)
        raise PlanError(
            f"target {profile.name!r} takes {names}, not {fmt}; choose other bits or another target"
        )
    return fmt


def _find_rule(scales: str) -> ScaleRule:
    try:
        return ScaleRule(scales)
    except ValueError:
        raise PlanError(f"scales {scales!r} is unknown; use {' or '.join(ScaleRule)}") from None
