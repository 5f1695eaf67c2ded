"""`qinvert.evaluate`: what a plan does to the model around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from qinvert.calibration.hooks import patched, run_model
from qinvert.calibration.tokens import token_batches
from qinvert.delta_rule import Inverse, exact
from qinvert.documents import to_document
from qinvert.errors import InputError
from qinvert.plan import LayerPlan, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Differences between the model with the exact inverse and with another one."""

    #: Mean over tokens of KL(exact || other), nats.
    kl: float
    #: Share of tokens whose most likely successor is the same.
    top1_agreement: float
    #: Mean next-token loss with the exact inverse, nats.
    loss: float
    #: Loss with the other inverse minus `loss`.
    loss_delta: float
    #: Tokens evaluated.
    tokens: int
    #: Task score with the exact inverse, where a task was given.
    exact_score: float | None = None
    #: Task score with the other inverse.
    score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        document: dict[str, Any] = to_document(self)
        return document


#: ``score(logits, tokens)``: a task's accuracy on one batch.
Score = Callable[[torch.Tensor, torch.Tensor], float]


def evaluate(
    model: torch.nn.Module,
    plan: Plan | LayerPlan | Inverse,
    data: Any,
    *,
    score: Score | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Evaluation:
    """Compare the model under ``plan`` with the same model under the exact inverse.

    Parameters
    ----------
    model : torch.nn.Module
    plan : Plan, LayerPlan or callable
        As for `qinvert.patched`.
    data
        Token batches, see `qinvert.calibration.tokens.token_batches`.
    score : callable, optional
        ``score(logits, tokens) -> float``, averaged over sequences.
    progress : callable, optional
        Called as ``progress("tokens", seen)`` after every batch.

    Raises
    ------
    InputError, PlanError
        See `qinvert.patched`.
    """
    sums = dict.fromkeys(("kl", "top1", "loss", "other_loss", "exact_score", "score"), 0.0)
    tokens = targets = sequences = 0
    for batch in token_batches(data):
        ids = batch["input_ids"]
        with patched(model, exact):
            reference = run_model(model, batch).to(torch.float32)
        with patched(model, plan):
            other = run_model(model, batch).to(torch.float32)
        if reference.shape[:2] != ids.shape:
            raise InputError(
                f"the model returns logits {list(reference.shape)} for tokens {list(ids.shape)}; "
                "leave out arguments that cut them"
            )
        p, q = log_softmax(reference, -1), log_softmax(other, -1)
        sums["kl"] += float(kl_div(q, p, reduction="sum", log_target=True))
        sums["top1"] += float((p.argmax(-1) == q.argmax(-1)).sum())
        sums["loss"] += _next_token_loss(p, ids)
        sums["other_loss"] += _next_token_loss(q, ids)
        if score is not None:
            sums["exact_score"] += score(reference, ids) * len(ids)
            sums["score"] += score(other, ids) * len(ids)
        tokens, targets, sequences = tokens + ids.numel(), targets + ids[:, 1:].numel(), sequences + len(ids)
        if progress is not None:
            progress("tokens", tokens)
    loss = sums["loss"] / max(targets, 1)
    return Evaluation(
        # Rounding may leave a tiny negative sum; NaN must stay visible.
        kl=sums["kl"] / tokens if not sums["kl"] < 0 else 0.0,
        top1_agreement=sums["top1"] / tokens,
        loss=loss,
        loss_delta=sums["other_loss"] / max(targets, 1) - loss,
        tokens=tokens,
        exact_score=None if score is None else sums["exact_score"] / sequences,
        score=None if score is None else sums["score"] / sequences,
    )


def _next_token_loss(log_probabilities: torch.Tensor, tokens: torch.Tensor) -> float:
    predicted = log_probabilities[:, :-1].flatten(0, 1)
    return float(cross_entropy(predicted, tokens[:, 1:].flatten().to(predicted.device), reduction="sum"))
