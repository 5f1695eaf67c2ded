"""Runs a deployed folder and compares its logits and states with the model that it was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.nn.functional import kl_div, log_softmax

from qinvert.calibration.model_identity import check_identity
from qinvert.calibration.patching import patched, run_model
from qinvert.errors import InputError, PlanError, VerificationError
from qinvert.export.deployment.deployment import Array, Deployment, windows
from qinvert.export.deployment.manifest import DECODE, PLAN, PREFILL, Manifest
from qinvert.export.deployment.options import DeployOptions, Weights
from qinvert.export.deployment.quantized_products import QuantizedProduct, quantized_as, quantized_products
from qinvert.export.deployment.step_calls import SimulatedSteps, layer_steps
from qinvert.export.deployment.window import Window, windowed
from qinvert.export.whole_models.check import random_tokens
from qinvert.export.whole_models.topk_ties import LowestIndexFirst
from qinvert.metrics import norm_share
from qinvert.plan.plan import Plan
from qinvert.progress import report

#: Tokens of the text that are decoded behind the longest prefill.
DECODED: Final = 8
#: Times that the last of them follows itself: where keys return, a state holds the most.
REPEATED: Final = 24
#: Largest distance of logits or states as a share of their norm.  Float32 products in another order round
#: an input to the next integer here and there; another program is wrong by a tenth and more.
TOLERANCE: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentCheck:
    """How one text came out of the graphs."""

    #: Tokens that went through the prefill graph, and through the decode graph.
    prefilled: int
    decoded: int
    #: Whether onnxruntime optimized the graphs.
    optimized: bool
    #: ``||x - y|| / ||y||`` of the logits, with y the same windows with simulated steps
    #: and, where weights are quantized, with the weights and the grids of the graphs.
    logits: float
    #: The largest such share of a state.
    states: float
    #: KL(patched model || graphs), nats per token of the prefill; the patched model sees the text whole.
    kl: float
    #: Share of these tokens whose most likely next token is the same.
    top1_agreement: float
    #: KL(model || decode graph), nats per decoded token; None where none is decoded.
    decode_kl: float | None


def default_lengths(window: int) -> tuple[int, ...]:
    """Lengths at which a deployment must be right: odd ones, whole windows, and more than one window."""
    return 1, window - 1, window, window + 1, 2 * window + 7


def verify_deployment(
    folder: str | PathLike[str],
    model: torch.nn.Module,
    tokens: Any = None,
    *,
    lengths: Sequence[int] | None = None,
    force: bool = False,
    tolerance: float = TOLERANCE,
) -> list[DeploymentCheck]:
    """Compare both graphs of a folder with the model, on onnxruntime, unoptimized and optimized.

    Every length starts from empty states; `DECODED` more tokens follow the longest one by the
    decode graph, on the states that prefill left, and then the last of these `REPEATED` times.

    Parameters
    ----------
    folder : path
        What `qinvert.deploy` wrote.
    model : torch.nn.Module
        The model that it was made of.
    tokens : optional
        Token ids ``[n]`` to run; random ones if left out.
    lengths : sequence of int, optional
        Tokens of each text; see `default_lengths`.
    force : bool
        Go on with another model.
    tolerance : float
        Largest distance that is allowed, see `TOLERANCE`.

    Returns
    -------
    list of DeploymentCheck

    Raises
    ------
    VerificationError
        If logits or states differ by more, with the length and the first state that does.
    InputError
        If the folder is no deployment, or there are fewer tokens than the longest length needs.
    PlanError
        If it was made of another model, or its plan is another one than the manifest names.
    """
    manifest, plan = Manifest.load(folder), Plan.load(Path(folder) / PLAN)
    if manifest.facts.get("plan_sha256") != plan.sha256:
        raise PlanError(f"{PLAN} is not the plan that the graphs were made of; deploy again")
    check_identity(plan, model, force)
    sizes = tuple(lengths or default_lengths(manifest.window))
    ids = _tokens(model, tokens, max(sizes) + DECODED)[: max(sizes) + DECODED]
    ids = np.concatenate([ids, np.repeat(ids[-1:], REPEATED)])
    reference = _Reference(model, plan, manifest, _products(Path(folder), manifest))
    found: list[DeploymentCheck] = []
    for optimized in (False, True):
        deployment = Deployment(folder, optimized=optimized)
        for length in sizes:
            report("texts", len(found), 2 * len(sizes))
            decoded = DECODED + REPEATED if length == max(sizes) else 0
            part = ids[: length + decoded]
            found.append(_check(deployment, reference, part, decoded, optimized, tolerance))
    return found


def _products(folder: Path, manifest: Manifest) -> dict[str, list[QuantizedProduct]]:
    """Products with quantized weights, by the file of their graph; both have the same number."""
    if manifest.weights == Weights.NONE:
        return {PREFILL: [], DECODE: []}
    found = {name: quantized_products(folder / name) for name in (PREFILL, DECODE)}
    facts = manifest.facts.get("graphs", {})
    for name, products in found.items():
        wanted = facts[name]["projections"]["nodes"]
        if len(products) != wanted:
            raise VerificationError(
                f"{name} has {len(products)} products with quantized weights, and the manifest says "
                f"{wanted}; deploy again"
            )
    return found


def _tokens(model: torch.nn.Module, given: Any, needed: int) -> Array:
    if given is None:
        return random_tokens(model, torch.Size((1, needed)))[0].cpu().numpy()
    ids = np.asarray(given)
    if ids.ndim != 1 or len(ids) < needed:
        raise InputError(f"tokens of shape {list(ids.shape)} are too few; pass {needed} in a row, or none")
    return ids


class _Reference:
    """The same calls with simulated steps and the graphs' weights, and the patched model on whole texts.

    Each text runs once.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        plan: Plan,
        manifest: Manifest,
        products: Mapping[str, Sequence[QuantizedProduct]],
    ) -> None:
        self.model, self.plan, self.manifest, self.products = model, plan, manifest, products
        self._known: dict[tuple[int, int], tuple[torch.Tensor, dict[str, torch.Tensor]]] = {}
        self._logits: dict[tuple[int, bool], torch.Tensor] = {}

    def windows(self, ids: Array, decoded: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Logits of all tokens, and the states behind them."""
        key = len(ids), decoded
        if key not in self._known:
            cut = len(ids) - decoded
            states: dict[str, torch.Tensor] = {state.name: state.zeros() for state in self.manifest.states}
            first, states = self._run(ids[:cut], states, self.manifest.chunks)
            rest, states = self._run(ids[cut:], states, None)
            self._known[key] = torch.cat([*first, *rest]), states
        return self._known[key]

    def _run(
        self, ids: Array, states: Mapping[str, torch.Tensor], chunks: int | None
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        options = DeployOptions(chunks=self.manifest.chunks, cache=self.manifest.cache or 1)
        window = Window(self.model, layer_steps(self.plan, chunks, None), SimulatedSteps(), options.cache)
        size, found, carried = (1 if chunks is None else self.manifest.window), [], dict(states)
        products = self.products[DECODE if chunks is None else PREFILL]
        with quantized_as(self.model, products), windowed(window, options.positions(self.manifest.chunk)):
            window.probe(size)
            for number, feed in windows(ids, size):
                valid = None if chunks is None else torch.from_numpy(feed["valid"])
                logits, *after = window(torch.from_numpy(feed["input_ids"]).long(), carried, valid)
                carried = {state.name: x for state, x in zip(window.states, after, strict=True)}
                found.append(logits[0, :number])
        return found, carried

    def whole(self, ids: Array) -> torch.Tensor:
        """Logits of the patched model."""
        return self._logits_of(ids, planned=True)

    def float_model(self, ids: Array) -> torch.Tensor:
        """Logits of the model itself."""
        return self._logits_of(ids, planned=False)

    def _logits_of(self, ids: Array, *, planned: bool) -> torch.Tensor:
        """Logits; of equal scores of blocks the first count, as in the graphs."""
        # All texts begin alike, so that their length tells them apart.
        key = len(ids), planned
        if key not in self._logits:
            given = {"input_ids": torch.from_numpy(ids.astype(np.int64))[None]}
            plan = patched(self.model, self.plan, force=True) if planned else nullcontext()
            with plan, LowestIndexFirst():
                self._logits[key] = run_model(self.model, given)[0]
        return self._logits[key]


def _check(
    deployment: Deployment,
    reference: _Reference,
    ids: Array,
    decoded: int,
    optimized: bool,
    tolerance: float,
) -> DeploymentCheck:
    cut = len(ids) - decoded
    deployment.reset()
    prefilled = deployment.prefill(ids[:cut])
    rows = [deployment.decode(int(token)) for token in ids[cut:]]
    logits = torch.from_numpy(np.concatenate([prefilled, *(row[None] for row in rows)]))
    wanted, states = reference.windows(ids, decoded)
    exact = reference.whole(ids[:cut])
    inside = logits[:cut]
    shares = {name: norm_share(torch.from_numpy(deployment.states[name]), x) for name, x in states.items()}
    check = DeploymentCheck(
        prefilled=cut,
        decoded=decoded,
        optimized=optimized,
        logits=norm_share(logits, wanted),
        states=max(shares.values()),
        kl=_divergence(exact, inside),
        top1_agreement=float((inside.argmax(-1) == exact.argmax(-1)).float().mean()),
        decode_kl=_divergence(reference.float_model(ids)[cut:], logits[cut:]) if decoded else None,
    )
    worst = {"logits": check.logits, **shares}
    wrong = [name for name, value in worst.items() if not value <= tolerance]
    if wrong:
        raise VerificationError(
            f"after {cut} tokens of prefill and {decoded} of decode {wrong[0]} differs from the simulated "
            f"plan by {worst[wrong[0]]:.2g} of its norm; {tolerance:g} is allowed; deploy again"
        )
    return check


def _divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """``KL(wanted || found)`` of logits, nats per token."""
    logs = log_softmax(found, -1), log_softmax(wanted, -1)
    return float(kl_div(*logs, log_target=True, reduction="sum") / len(found))
