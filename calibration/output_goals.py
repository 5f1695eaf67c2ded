"""Goals in the model's terms: from errors of T to U and W, to each layer's output, to the logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from qinvert.calibration.evaluate import Evaluation, evaluate
from qinvert.calibration.head_errors import HeadErrors
from qinvert.calibration.head_names import head_number, layer_name
from qinvert.calibration.planning.explanation import decibels, rounded_share
from qinvert.checks import check_decibels, check_magnitude
from qinvert.documents import to_document
from qinvert.errors import PlanError
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.progress import track

#: Sqnr of T that layers start from, where the goals are those of outputs.
START_DB: Final = 10.0
#: Largest loss against the floor of T that such goals allow: the output decides.
ANY_LOSS_DB: Final = 1000.0
#: Sequences of the data on which outputs are measured.
SEQUENCES: Final = 4
#: Times that layers are planned again.
ROUNDS: Final = 8
#: Largest number of decibels that a layer is raised by at once.
MOST_DB: Final = 100.0
#: Noise power that stands for none.
NO_NOISE: Final = 1e-30
#: Decibels by which a layer is raised beyond what it lacks, so that few rounds are needed.
MARGIN_DB: Final = 0.5

#: Plans one layer, or one head, for a goal of T in dB.
Planning = Callable[[str, float], LayerPlan]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputGoals:
    """What a plan should reach behind T; None where nothing is asked."""

    #: Smallest ``20 log10(||o|| / ||o_hat - o||)`` of each layer's output.
    min_output_sqnr_db: float | None = None
    #: Largest mean KL(exact || plan) of the logits, nats per token.
    max_kl: float | None = None

    def __post_init__(self) -> None:
        if self.min_output_sqnr_db is not None:
            check_decibels("min_output_sqnr_db", self.min_output_sqnr_db, PlanError)
        if self.max_kl is not None:
            check_magnitude("max_kl", self.max_kl, PlanError, "pass for example 1e-3")

    @property
    def given(self) -> bool:
        """Whether there is any such goal."""
        return self.min_output_sqnr_db is not None or self.max_kl is not None

    def check_source(self, source: object) -> None:
        """Refuse sources without outputs.

        Raises
        ------
        PlanError
            If there is a goal and the source is not a model.
        """
        if self.given and not isinstance(source, torch.nn.Module):
            raise PlanError(
                f"min_output_sqnr_db and max_kl need a model, not {type(source).__name__}; pass the model "
                "with data=..., or min_sqnr_db, the goal for T"
            )

    def lacking(self, found: Evaluation) -> dict[str, float]:
        """Decibels that each layer's output lacks; layers that lack nothing are left out.

        KL grows like the noise of the outputs.  If it is too large, the noise that is allowed is shared
        equally: layers below their share need nothing, and bits go where the noise is.
        """
        noise = {name: 10 ** (-layer.out / 10) for name, layer in found.layers.items()}
        wanted = dict.fromkeys(noise, math.inf)
        if self.min_output_sqnr_db is not None:
            wanted = dict.fromkeys(noise, 10 ** (-self.min_output_sqnr_db / 10))
        if self.max_kl is not None and not found.kl <= self.max_kl:
            # NaN fails, too; then all layers are raised.
            share = max(NO_NOISE, sum(noise.values()) / len(noise) * self.max_kl / found.kl)
            wanted = {name: min(most, share) for name, most in wanted.items()}
        above = {name: noise[name] / wanted[name] for name in noise if noise[name] > wanted[name]}
        return {name: _lacking_db(ratio) for name, ratio in above.items()}


def _lacking_db(ratio: float) -> float:
    # A goal of no noise at all, as max_kl=0 is, lacks more than any grid can give.
    return min(MOST_DB, 10 * math.log10(ratio))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """Plans, and what they do to the model."""

    layers: Mapping[str, LayerPlan]
    found: Evaluation
    #: Decibels that the output of a layer still lacks.
    lacking: Mapping[str, float] = field(default_factory=dict)


def reach(
    model: torch.nn.Module,
    batches: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    goals: OutputGoals,
    planning: Planning,
    start_db: float = START_DB,
) -> Reached:
    """Plan each entry for a goal of T, and raise the goals until the outputs reach theirs.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence
        Batches of `qinvert.calibration.data.token_batches.token_batches` that are measured.
    names : sequence of str
        Entries of the plan.
    goals : OutputGoals
    planning : callable
        ``planning(name, goal_db)`` returns the plan of one entry.
    start_db : float
        Goal of T that all entries start from.
    """
    wanted = dict.fromkeys(names, start_db)
    layers = {name: planning(name, start_db) for name in track(names, "layers", len(names))}
    for _ in track(range(ROUNDS), "rounds at most", ROUNDS):
        found = evaluate(model, Plan(layers=layers, target=""), list(batches))
        lacking = goals.lacking(found)
        raised = [name for name in names if layer_name(name) in lacking]
        if not raised:
            break
        before = layers
        for name in raised:
            layer = layer_name(name)
            errors = found.layers[layer]
            # Goals of whole chunk steps are those of outputs themselves.
            reached = errors.out if errors.t is None else errors.t
            base = max(wanted[name], reached) if math.isfinite(reached) else wanted[name]
            wanted[name] = base + lacking[layer] + MARGIN_DB
        again = {name: planning(name, wanted[name]) for name in track(raised, "layers", len(raised))}
        layers = {name: again.get(name, before[name]) for name in names}
        if all(_same(layers[name], before[name]) for name in raised):
            # The widest grids are in use: what was measured holds for these plans.
            break
    else:
        found = evaluate(model, Plan(layers=layers, target=""), list(batches))
        lacking = goals.lacking(found)
    return Reached(layers=layers, found=found, lacking=lacking)


def _same(one: LayerPlan, other: LayerPlan) -> bool:
    return one.program == other.program and dict(one.tensors) == dict(other.tensors)


def facts_of(reached: Reached, name: str, min_sqnr_db: float | None) -> dict[str, Any]:
    """Return what the provenance of an entry says of its layer's output, as JSON types.

    ``min_sqnr_db`` is the caller's goal for T; None where only outputs count.
    """
    layer, number = layer_name(name), head_number(name)
    lacks = reached.lacking.get(layer, 0.0)
    own = reached.layers[name].provenance
    reaches_t = min_sqnr_db is None or own["expected_sqnr_db"] >= min_sqnr_db
    fix = own["fix"] or "a wider format for this layer would reach it"
    missed = f"the output lacks {lacks:.1f} dB; {fix}" if lacks else fix
    return {
        "output_sqnr_db": decibels(reached.found.layers[layer].out),
        "output_heads": [
            _rounded(head) for head in reached.found.layers[layer].heads if number in (None, head.head)
        ],
        "meets_goal": not lacks and reaches_t,
        "fix": "" if not lacks and reaches_t else missed,
    }


def _rounded(head: HeadErrors) -> dict[str, Any]:
    """Return a head as JSON types, with as many digits as plans hold."""
    share, output = head.output_share or 0.0, head.output_sqnr_db
    found = replace(
        head,
        sqnr_db=decibels(head.sqnr_db),
        signal_share=rounded_share(head.signal_share),
        output_share=rounded_share(share),
        output_sqnr_db=decibels(math.inf if output is None else output),
    )
    document: dict[str, Any] = to_document(found)
    return document


def with_facts(reached: Reached, min_sqnr_db: float | None) -> dict[str, LayerPlan]:
    """Return the plans, each with `facts_of` its layer's output."""
    return {
        name: replace(plan, provenance={**plan.provenance, **facts_of(reached, name, min_sqnr_db)})
        for name, plan in reached.layers.items()
    }


def summary_of(reached: Reached, goals: OutputGoals) -> dict[str, Any]:
    """Return what the provenance of the whole plan says of outputs, as JSON types."""
    given = {"min_output_sqnr_db": goals.min_output_sqnr_db, "max_kl": goals.max_kl}
    return {
        **{name: value for name, value in given.items() if value is not None},
        "kl": float(f"{reached.found.kl:.3g}"),
        "output_tokens": reached.found.tokens,
    }
