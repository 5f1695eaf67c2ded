"""`qinvert.evaluate`: what a plan does to the layers and the model around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Final

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from qinvert.calibration.data.token_batches import attended, token_batches
from qinvert.calibration.data.token_data import with_options
from qinvert.calibration.head_errors import HeadErrors, head_errors, with_outputs
from qinvert.calibration.model_identity import check_identity
from qinvert.calibration.patching import by_layer, patched_by_layer, run_model, solve_chunks
from qinvert.calibration.running import LayerInverse
from qinvert.delta_rule.chunks import Applied, ChunkOutputs, DeltaChunks
from qinvert.delta_rule.rule import Inverse, applicable
from qinvert.documents import to_document
from qinvert.errors import InputError
from qinvert.html_table import html_table
from qinvert.matrices import solve
from qinvert.metrics import ErrorStatistics, NoiseStatistics
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.pretrained import opened

#: Label of what is not to be predicted, as in transformers.
IGNORED: Final = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerErrors:
    """What the error of one layer's T becomes inside the layer, as ``20 log10(||x|| / ||x_hat - x||)``, dB.

    Both sides have the same inputs: those that reach the layer under the plan.
    """

    #: T below its diagonal; None where a whole step was run.
    t: float | None
    #: ``U = T (beta v)``; None where a whole step was run.
    u: float | None
    #: ``W = T (beta k exp(G))``; None where a whole step was run.
    w: float | None
    #: The layer's output, before its norm and projection.
    out: float
    #: The state after the last chunk; None where padding behind the tokens has left nothing of it.
    state: float | None
    #: Every head: its T, its own output, and its shares of the layer's T and output.
    heads: tuple[HeadErrors, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Evaluation:
    """Differences between the model with the exact inverse and with another one."""

    #: Mean over tokens of KL(exact || other), nats.  Padding does not count.
    kl: float
    #: Share of tokens whose most likely successor is the same.
    top1_agreement: float
    #: Mean next-token loss with the exact inverse, nats; where ``labels`` are given, on those from 0.
    loss: float
    #: Loss with the other inverse minus `loss`.
    loss_delta: float
    #: Tokens evaluated, without padding.
    tokens: int
    #: Task score with the exact inverse, where a task was given.
    exact_score: float | None = None
    #: Task score with the other inverse.
    score: float | None = None
    #: Errors of every layer by itself.
    layers: dict[str, LayerErrors] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON types."""
        document: dict[str, Any] = to_document(self)
        return document

    def __repr__(self) -> str:
        return f"<Evaluation of {self.tokens} tokens: KL {self.kl:.3g} nats, top-1 {self.top1_agreement:.2%}>"

    def _repr_html_(self) -> str:
        caption = f"KL {self.kl:.3g} nats, top-1 agreement {self.top1_agreement:.2%}, {self.tokens} tokens"
        rows = [
            [name, *("-" if x is None else f"{x:.1f}" for x in (e.t, e.u, e.w, e.state, e.out))]
            for name, e in self.layers.items()
        ]
        return html_table(f"{caption}; sqnr in dB", ["layer", "T", "U", "W", "state", "output"], rows)


#: ``score(logits, tokens)``: a task's accuracy on one batch.
Score = Callable[[torch.Tensor, torch.Tensor], float]
#: Called after every batch with what is counted and how many there were.
Progress = Callable[[str, int], None]


def evaluate(
    model: torch.nn.Module | str | PathLike[str],
    plan: Plan | LayerPlan | Inverse,
    data: Any,
    *,
    score: Score | None = None,
    num_samples: int | None = None,
    seq_len: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Evaluation:
    """Compare the model under ``plan`` with the same model under the exact inverse.

    Parameters
    ----------
    model : torch.nn.Module or path
    plan : Plan, LayerPlan or callable
        As for `qinvert.patched`.
    data
        Text or tokens, see `qinvert.calibration.data.token_batches.token_batches`.
    score : callable, optional
        ``score(logits, tokens) -> float``.  Both arguments are on the logits' device; the
        scores are averaged over sequences.
    num_samples, seq_len : int, optional
        How many sequences of ``data`` to read, and how many tokens each of
        them has; see `qinvert.TokenData`.
    progress : callable, optional
        Called as ``progress("tokens", seen)`` after every batch.
    force : bool
        Go on with another model than the one that the plan was made for.

    Raises
    ------
    InputError, PlanError
        See `qinvert.patched`.
    """
    loaded = opened(model)
    if not isinstance(loaded, torch.nn.Module):
        raise InputError(
            f"the first argument is a {type(model).__name__}; call evaluate(model, plan, data), in this order"
        )
    tokens = with_options(data, num_samples, seq_len)
    return compare(loaded, {"plan": plan}, tokens, score=score, progress=progress, force=force)["plan"]


def compare(
    model: torch.nn.Module | str | PathLike[str],
    plans: Mapping[str, Plan | LayerPlan | Inverse],
    data: Any,
    *,
    score: Score | None = None,
    num_samples: int | None = None,
    seq_len: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> dict[str, Evaluation]:
    """Evaluate several plans as `evaluate` does, in one pass over the data.

    Parameters
    ----------
    plans : mapping
        Plans or inverses by the name that the result gives them.
    model, data, score, num_samples, seq_len, progress, force
        As for `evaluate`.

    Raises
    ------
    InputError, PlanError
        See `qinvert.patched`.
    """
    loaded = opened(model)
    running = {name: _Comparison(by_layer(loaded, plan), score) for name, plan in plans.items()}
    for plan in plans.values():
        check_identity(plan, loaded, force)
    tokens = 0
    for batch in token_batches(with_options(data, num_samples, seq_len), loaded):
        with patched_by_layer(loaded, solve_chunks):
            reference = run_model(loaded, batch).to(torch.float32)
        ids = batch["input_ids"]
        if reference.shape[:2] != ids.shape:
            raise InputError(
                f"the model returns logits {list(reference.shape)} for tokens {list(ids.shape)}; "
                "leave out arguments that cut them"
            )
        for comparison in running.values():
            comparison.update(loaded, batch, reference)
        tokens += int(attended(batch).sum())
        if progress is not None:
            progress("tokens", tokens)
    if not tokens:
        raise InputError("attention_mask is 0 for every token; pass data with at least one real token")
    return {name: comparison.result() for name, comparison in running.items()}


class _LayerComparison:
    """Streams the errors of one layer."""

    def __init__(self) -> None:
        self.t = ErrorStatistics()
        self.parts = {name: NoiseStatistics() for name in ("u", "w", "out", "state")}
        self._seen: set[str] = set()
        self.heads: dict[int, ErrorStatistics] = {}
        self.outputs: dict[int, NoiseStatistics] = {}

    def update(self, chunks: DeltaChunks, t: Applied | ChunkOutputs) -> None:
        if isinstance(t, ChunkOutputs):
            self._compare(t, chunks.apply(solve_chunks("", chunks)))
            return
        lower = chunks.lower
        one = torch.eye(lower.shape[-1], dtype=torch.float32, device=lower.device).expand_as(lower)
        estimate, truth = t if isinstance(t, torch.Tensor) else t @ one, solve(lower)
        self.t.update(estimate, truth)
        for head in range(lower.shape[1]):
            own = self.heads.setdefault(head, ErrorStatistics())
            own.update(estimate[:, head], truth[:, head])
        self._compare(chunks.apply(t), chunks.apply(solve_chunks("", chunks)))

    def _compare(self, other: ChunkOutputs, exact: ChunkOutputs) -> None:
        for name, statistics in self.parts.items():
            if (found := getattr(other, name)) is not None:
                self._seen.add(name)
                statistics.update(found, getattr(exact, name))
        for head in range(exact.out.shape[1]):
            output = self.outputs.setdefault(head, NoiseStatistics())
            output.update(other.out[:, head], exact.out[:, head])

    def result(self) -> LayerErrors:
        found = {name: x.sqnr_db if name in self._seen else None for name, x in self.parts.items()}
        out, last = self.parts["out"].sqnr_db, self.parts["state"]
        # A state that has decayed to nothing has no error either: that is no measurement.
        state = last.sqnr_db if last.signal or last.noise else None
        t = self.t.sqnr_db if self.t.matrices else None
        heads = with_outputs(head_errors(self.heads), self.outputs) if self.heads else ()
        return LayerErrors(t=t, u=found["u"], w=found["w"], out=out, state=state, heads=heads)


class _Comparison:
    """Streams the differences between a model under one inverse and its reference."""

    def __init__(self, inverse: LayerInverse, score: Score | None) -> None:
        self._inverse = inverse
        self._score = score
        self._layers: dict[str, _LayerComparison] = {}
        self._sums = dict.fromkeys(("kl", "top1", "loss", "other_loss", "exact_score", "score"), 0.0)
        self._tokens = self._targets = self._sequences = 0

    def update(self, model: torch.nn.Module, batch: dict[str, Any], reference: torch.Tensor) -> None:
        """Add one batch, whose logits with the exact inverse are ``reference``."""
        with patched_by_layer(model, self._followed):
            other = run_model(model, batch).to(torch.float32)
        ids, sums = batch["input_ids"], self._sums
        p, q = log_softmax(reference, -1), log_softmax(other, -1)
        real, targets = attended(batch), _targets(batch)
        own, others = p[real.to(p.device)], q[real.to(q.device)]
        sums["kl"] += float(kl_div(others, own, reduction="sum", log_target=True))
        sums["top1"] += float((own.argmax(-1) == others.argmax(-1)).sum())
        sums["loss"] += _next_token_loss(p, targets)
        sums["other_loss"] += _next_token_loss(q, targets)
        if self._score is not None:
            on_device = ids.to(reference.device)
            sums["exact_score"] += self._score(reference, on_device) * len(ids)
            sums["score"] += self._score(other, on_device) * len(ids)
        self._tokens += int(real.sum())
        self._targets += int((targets != IGNORED).sum())
        self._sequences += len(ids)

    def _followed(self, layer: str, chunks: DeltaChunks) -> Applied | ChunkOutputs:
        t = self._inverse(layer, chunks)
        if not isinstance(t, ChunkOutputs):
            t = applicable(t, chunks)
        self._layers.setdefault(layer, _LayerComparison()).update(chunks, t)
        return t

    def result(self) -> Evaluation:
        """Return the means over everything seen."""
        sums, targets = self._sums, max(self._targets, 1)
        loss = sums["loss"] / targets
        scored = self._score is not None
        return Evaluation(
            # Rounding may leave a tiny negative sum; NaN must stay visible.
            kl=sums["kl"] / self._tokens if not sums["kl"] < 0 else 0.0,
            top1_agreement=sums["top1"] / self._tokens,
            loss=loss,
            loss_delta=sums["other_loss"] / targets - loss,
            tokens=self._tokens,
            exact_score=sums["exact_score"] / self._sequences if scored else None,
            score=sums["score"] / self._sequences if scored else None,
            layers={layer: comparison.result() for layer, comparison in self._layers.items()},
        )


def _targets(batch: Mapping[str, Any]) -> torch.Tensor:
    """What every token but the last should be followed by, `IGNORED` beside padding."""
    real, labels = attended(batch), batch.get("labels")
    wanted = labels if isinstance(labels, torch.Tensor) else batch["input_ids"]
    counted = real[:, 1:] & real[:, :-1] & (wanted[:, 1:] >= 0)
    return wanted[:, 1:].masked_fill(~counted, IGNORED)


def _next_token_loss(log_probabilities: torch.Tensor, targets: torch.Tensor) -> float:
    predicted, wanted = (
        log_probabilities[:, :-1].flatten(0, 1),
        targets.flatten().to(log_probabilities.device),
    )
    return float(cross_entropy(predicted, wanted, reduction="sum", ignore_index=IGNORED))
