"""What a plan reaches on matrices that nothing was chosen on, with the uncertainty of that figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from qinvert.calibration.head_errors import HeadErrors, head_errors, heads_below
from qinvert.calibration.head_names import head_number, layer_name
from qinvert.calibration.heads import NO_HEAD
from qinvert.calibration.observation.held_out import HeldOut, held_out
from qinvert.calibration.observation.statistics import LayerObserver
from qinvert.calibration.planning.explanation import decibels, rounded_share
from qinvert.documents import to_document
from qinvert.metrics import ErrorStatistics, ratio_db
from qinvert.plan.plan import LayerPlan
from qinvert.simulation import simulate_inverse

#: Samples that are drawn with replacement for an interval.
RESAMPLES: Final = 400
#: Matrices of one sequence are alike: a sample says as much as this share of independent ones.
INDEPENDENT: Final = 0.25
#: Ends of an interval, in percent of the resamples.
ENDS: Final = (5, 95)
#: Seed of the resamples: equal data give equal plans.
SEED: Final = 0
#: An interval that is wider than this says that a few matrices decide the figure.
WIDEST_DB: Final = 6.0
#: Half of the matrices misses the tail if the largest entry of the other half is this much larger.
TAIL: Final = 1.5
#: What helps heads below the goal, where nothing was tried; and where goals of outputs rule that out.
TRY_AUTO: Final = "granularity='auto' gives heads grids of their own where that helps"
TRY_HEADS: Final = "granularity='head' gives each head grids of its own"
#: What a layer says of data without a matrix.
NO_MATRIX: Final = "every matrix L was zero: nothing was calibrated; pass data on which the layer is active"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unseen:
    """The errors of one layer on held-out matrices."""

    #: Sqnr over all these matrices.
    sqnr_db: float
    #: The sqnr of 90 % of the resamples lies between these, see `interval`.
    low_db: float
    high_db: float
    #: Matrices that were measured.
    matrices: int
    #: Whether the planner saw none of them; otherwise the data was too small to hold any out.
    held_out: bool
    #: Errors of every head; empty where the matrices have no axis of heads.
    heads: tuple[HeadErrors, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        document: dict[str, Any] = to_document(self)
        return document


def measure_unseen(plan: LayerPlan, held: HeldOut) -> Unseen:
    """Simulate a plan on held-out matrices."""
    truth = held.systems.inverse()
    estimate = simulate_inverse(plan, held.systems)
    signal, noise = powers(estimate, truth)
    low, high = interval(signal, noise)
    return Unseen(
        sqnr_db=decibels(ratio_db(float(signal.sum()), float(noise.sum()))),
        low_db=decibels(low),
        high_db=decibels(high),
        matrices=held.systems.count,
        held_out=held.apart,
        heads=_heads(estimate, truth, held.heads),
    )


def held_out_db(plan: LayerPlan, held: HeldOut) -> float:
    """Return the sqnr of a plan over all held-out matrices, as plans hold decibels."""
    signal, noise = powers(simulate_inverse(plan, held.systems), held.systems.inverse())
    return decibels(ratio_db(float(signal.sum()), float(noise.sum())))


def powers(estimate: torch.Tensor, truth: torch.Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return signal and noise of every matrix ``[n, C, C]``, below the diagonal."""
    exact = torch.tril(truth, -1)
    error = torch.tril(estimate.to(torch.float64) - truth, -1)
    return exact.square().sum((1, 2)).cpu().numpy(), error.square().sum((1, 2)).cpu().numpy()


def interval(signal: np.ndarray[Any, Any], noise: np.ndarray[Any, Any]) -> tuple[float, float]:
    """``10 log10(sum signal / sum noise)`` between which 90 % of the resamples lie (bootstrap).

    A resample has the share `INDEPENDENT` of the matrices.
    """
    count = max(1, int(INDEPENDENT * len(signal)))
    chosen = np.random.default_rng(SEED).integers(len(signal), size=(RESAMPLES, count))
    values = sorted(
        ratio_db(float(s), float(n)) for s, n in zip(signal[chosen].sum(1), noise[chosen].sum(1), strict=True)
    )
    first, last = (values[end * (RESAMPLES - 1) // 100] for end in ENDS)
    return first, last


def _heads(estimate: torch.Tensor, truth: torch.Tensor, numbers: torch.Tensor) -> tuple[HeadErrors, ...]:
    statistics: dict[int, ErrorStatistics] = {}
    for head in sorted(set(numbers.tolist()) - {NO_HEAD}):
        own = (numbers == head).to(truth.device)
        statistics.setdefault(head, ErrorStatistics()).update(estimate[own], truth[own])
    return tuple(
        replace(head, sqnr_db=decibels(head.sqnr_db), signal_share=rounded_share(head.signal_share))
        for head in head_errors(statistics)
    )


def signal_shares(observers: Mapping[str, LayerObserver]) -> dict[str, float]:
    """Share of each head's held-out matrices in the signal of its layer, for entries of one head."""
    signals: dict[str, float] = {}
    for name, observer in observers.items():
        held = None if head_number(name) is None else held_out(observer.sample, observer.held)
        if held is not None:
            exact = held.systems.inverse()
            signals[name] = float(powers(exact, exact)[0].mean())
    totals: dict[str, float] = {}
    for name, signal in signals.items():
        totals[layer_name(name)] = totals.get(layer_name(name), 0.0) + signal
    return {name: signal / (totals[layer_name(name)] or 1.0) for name, signal in signals.items()}


def unseen_facts(
    plan: LayerPlan,
    observer: LayerObserver,
    goal_db: float,
    *,
    of_model: bool,
    share: float | None = None,
    remedy: str | None = TRY_AUTO,
) -> dict[str, Any]:
    """Return what a plan says of data that it was not chosen on, as JSON types.

    Parameters
    ----------
    plan : LayerPlan
    observer : LayerObserver
    goal_db : float
        Goal for the sqnr of T.
    of_model : bool
        Whether heads are those of a model.  Which axis of bare matrices counts heads is a
        convention, which not every caller keeps: their heads are listed only where one of
        them stays below the goal.
    share : float, optional
        That of `signal_shares` where the plan is of one head.
    remedy : str, optional
        What helps heads below the goal; None where the layer misses its goal and says so by itself.
    """
    held = held_out(observer.sample, observer.held)
    if held is None:
        missed = {"meets_goal": False, "fix": NO_MATRIX}
        return {"unseen": None, "head_cautions": [], "data_cautions": [NO_MATRIX], **missed}
    unseen = measure_unseen(plan, held)
    if share is not None:
        unseen = replace(
            unseen, heads=tuple(replace(h, signal_share=rounded_share(share)) for h in unseen.heads)
        )
    else:
        unseen = replace(unseen, heads=listed_heads(unseen.heads, goal_db, of_model))
    return {
        "unseen": unseen.to_dict(),
        "head_cautions": head_cautions(unseen.heads, goal_db, remedy),
        "data_cautions": _of_sample(unseen, observer.halves),
    }


def listed_heads(heads: Sequence[HeadErrors], goal_db: float, of_model: bool) -> tuple[HeadErrors, ...]:
    """Return the heads that a plan lists: those of a model, or all where one stays below the goal."""
    return tuple(heads) if of_model or heads_below(heads, goal_db) else ()


def head_cautions(heads: Sequence[HeadErrors], goal_db: float, remedy: str | None) -> list[str]:
    """Return one text that names the heads below the goal; none without such heads or a remedy."""
    below = heads_below(heads, goal_db)
    if not below or remedy is None:
        return []
    each = ", ".join(
        f"head {h.head} {h.sqnr_db:.1f} dB with {h.signal_share:.1%} of the signal" for h in below
    )
    return [f"{each}: below the goal of {goal_db:g} dB; {remedy}"]


def _of_sample(unseen: Unseen, halves: Sequence[float]) -> list[str]:
    smaller, larger = sorted(halves)
    if larger > TAIL * smaller:
        return [
            f"max|M| is {larger:.3g} in one half of the matrices and {smaller:.3g} in the other: the sample "
            "is too small for its tail, and larger values will saturate; pass more sequences"
        ]
    if unseen.high_db - unseen.low_db > WIDEST_DB:
        return [
            f"a few matrices decide the figure: {unseen.low_db:.1f} to {unseen.high_db:.1f} dB on "
            f"{unseen.matrices} matrices; pass more sequences"
        ]
    return []
