"""Puts another inverse into a Hugging Face model, and captures L from it.

Models call a chunked delta rule through a global of their module, or
(transformers up to 5.14) through an attribute of the layer.  Both are replaced
by `qinvert.delta_rule.chunk_gated_delta_rule` with a pluggable inverse, for
the time of a ``with`` block.  No model code is copied.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final
from weakref import WeakSet

import torch

from qinvert.calibration.chunk_steps.results import layer_results, plan_results
from qinvert.calibration.head_names import is_split
from qinvert.calibration.model_identity import check_identity
from qinvert.calibration.running import DeltaRule, LayerInverse, redirect, running, track
from qinvert.calibration.wrappers import COMPILED, own_names
from qinvert.delta_rule.chunks import DeltaChunks
from qinvert.delta_rule.rule import Inverse, chunk_gated_delta_rule, exact
from qinvert.errors import InputError, PlanError, QInvertError, reason
from qinvert.matrices import SolvedInverse, exact_inverse
from qinvert.plan.plan import LayerPlan, Plan

#: Module globals that models call in prefill: with one decay per head, and with one per channel.
GLOBAL_NAMES: Final = ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention")
#: Attribute of a layer in older transformers.
ATTRIBUTE_NAME: Final = "chunk_gated_delta_rule"
#: Model types of transformers with such layers.
FAMILIES: Final = (
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen4_exp",
    "olmo_hybrid",
    "kimi_linear",
    "bailing_hybrid",
    "glm5_next",
)

_patched_models: WeakSet[torch.nn.Module] = WeakSet()


@contextmanager
def patched(
    model: torch.nn.Module, inverse: Plan | LayerPlan | Inverse, *, force: bool = False
) -> Iterator[torch.nn.Module]:
    """Run ``model`` with another inverse inside a ``with`` block.

    Parameters
    ----------
    model : torch.nn.Module
        A Hugging Face model with delta-rule layers, see `FAMILIES`.
    inverse : Plan, LayerPlan or callable
        A plan simulates each layer's integer program; a callable maps
        ``L [batch, heads, chunks, C, C]`` to T.  `qinvert.exact_inverse` does
        not form T but solves for what T is multiplied with, in float32.  Many
        models do the same; for these nothing changes, not even a rounding.
    force : bool
        Go on with another model than the one that the plan was made for.

    Yields
    ------
    torch.nn.Module
        ``model``; everything is restored on exit, also after an exception.

    Raises
    ------
    InputError
        If the model has no such layer, or is patched already.
    PlanError
        If the plan lacks a layer of the model, or was made for another model.
    """
    # A layer that is missing says more than another hash.
    found = by_layer(model, inverse)
    check_identity(inverse, model, force)
    with patched_by_layer(model, found):
        yield model


def by_layer(model: torch.nn.Module, inverse: Plan | LayerPlan | Inverse) -> LayerInverse:
    """Return what `patched` takes as a function of a layer's name and chunks.

    Raises
    ------
    InputError
        If it is not an inverse.
    PlanError
        If the plan lacks a layer of the model.
    """
    match inverse:
        case Plan():
            lacking = [
                name
                for name in delta_layers(model)
                if name not in inverse.layers and not is_split(inverse, name)
            ]
            if lacking:
                raise PlanError(
                    f"the plan lacks layer {lacking[0]!r}; it has {', '.join(inverse.layers)}; "
                    "calibrate this model"
                )
            return lambda layer, chunks: plan_results(inverse, layer, chunks)
        case LayerPlan():
            return lambda _, chunks: layer_results(inverse, chunks)
        case _ if inverse is exact or inverse is exact_inverse:
            return solve_chunks
        case _ if callable(inverse):
            return lambda _, chunks: inverse(chunks.lower)
    raise InputError(
        f"cannot use {type(inverse).__name__} as an inverse; pass a plan or a callable inverse(L)"
    )


def solve_chunks(_layer: str, chunks: DeltaChunks) -> SolvedInverse:
    """Return the exact inverse, as a `LayerInverse`."""
    return SolvedInverse(chunks.lower)


def delta_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the model's delta-rule layers by module name, which no wrapper changes.

    Raises
    ------
    InputError
        If it has none.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"{type(model).__name__} is not a model; pass a torch.nn.Module")
    layers = {
        name: m
        for name, m in model.named_modules()
        if _called(m) is not None or (hasattr(m, ATTRIBUTE_NAME) and not hasattr(m, COMPILED))
    }
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no delta-rule layer; the supported Hugging Face models are "
            f"{', '.join(FAMILIES)}; for other models, pass the matrices L themselves"
        )
    names = own_names(model, layers)
    return {names[name]: layer for name, layer in layers.items()}


def _called(layer: torch.nn.Module) -> tuple[Any, str] | None:
    """Return the Python module and the name of its global that the layer's forward calls, or None."""
    for kind in type(layer).__mro__:
        forward = inspect.unwrap(vars(kind).get("forward", lambda: None))
        names = getattr(getattr(forward, "__code__", None), "co_names", ())
        for name in GLOBAL_NAMES:
            if name in names:
                return sys.modules[kind.__module__], name
    return None


@contextmanager
def patched_by_layer(model: torch.nn.Module, inverse: LayerInverse) -> Iterator[None]:
    """Do what `patched` does, with an inverse that is also told the layer's name."""

    def rule_of(name: str) -> DeltaRule:
        return partial(chunk_gated_delta_rule, chunk_inverse=partial(inverse, name))

    with redirected(model, rule_of):
        yield


@contextmanager
def redirected(model: torch.nn.Module, rule_of: Callable[[str], DeltaRule]) -> Iterator[None]:
    """Have every delta-rule layer call the rule of its name, inside a ``with`` block.

    Raises
    ------
    InputError
        If the model has no such layer, or is patched already.
    """
    layers = delta_layers(model)
    if model in _patched_models:
        raise InputError("this model is patched already; leave the outer `with patched(...)` first")
    with ExitStack() as undo:
        _patched_models.add(model)
        undo.callback(_patched_models.discard, model)
        for name, layer in layers.items():
            track(layer, rule_of(name), undo)
            if hasattr(layer, ATTRIBUTE_NAME):
                redirect(layer, ATTRIBUTE_NAME, undo)
        for called in {_called(layer) for layer in layers.values()}:
            if called is not None:
                redirect(*called, undo)
        yield


def run_model(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Return the logits of one batch, computed on the model's device without gradients.

    Raises
    ------
    InputError
        If a token lies outside the vocabulary, the model refuses the batch, or it returns no logits.
    """
    logits = getattr(forward(model, batch), "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise InputError(f"{type(model).__name__} returns no logits; pass the model with its head")
    return logits


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model takes its inputs: weights that are offloaded say nothing of it.

    accelerate keeps such weights as meta tensors, and the device in a hook.
    """
    given = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if given is not None:
        return torch.device(given)
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def forward(model: torch.nn.Module, batch: dict[str, Any]) -> Any:
    """Run one batch on the model's device without gradients, and return what the model returns.

    Raises
    ------
    InputError
        If a token lies outside the vocabulary, or the model refuses the batch.
    """
    device = device_of(model)
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    tokens, size = inputs.get("input_ids"), vocabulary_size(model)
    if tokens is not None and size is not None and not bool(((tokens >= 0) & (tokens < size)).all()):
        raise InputError(
            f"token ids go from {int(tokens.min())} to {int(tokens.max())}, but the model's vocabulary has "
            f"{size} tokens; tokenize for this model"
        )
    with torch.no_grad(), _refusals(inputs):
        return model(**inputs)


def vocabulary_size(model: torch.nn.Module) -> int | None:
    """Return the number of tokens that the model knows, None where its configuration does not say."""
    config = getattr(model, "config", None)
    # Models of text and images have a separate configuration for their text part.
    size = getattr(getattr(config, "text_config", config), "vocab_size", None)
    return size if isinstance(size, int) else None


@contextmanager
def _refusals(inputs: dict[str, Any]) -> Iterator[None]:
    # A model may raise any type of exception on inputs that do not fit it.
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        failure, running.failure = running.failure, None
        if error is failure or isinstance(error, QInvertError):
            raise
        raise InputError(
            f"the model refuses the batch ({', '.join(map(str, inputs))}): {reason(error)}"
        ) from error
