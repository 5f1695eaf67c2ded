"""Which model a plan was made for, and whether another one is that model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch

from qinvert.calibration.head_names import layer_name
from qinvert.calibration.model_digest import weights_digest
from qinvert.errors import PlanError
from qinvert.plan.plan import Plan

#: Key of a plan's provenance.
MODEL: Final = "model"
#: Parts of a configuration that say how a model is loaded, and not what it computes.
LOADING: Final = frozenset({"dtype", "torch_dtype", "transformers_version", "use_cache", "architectures"})
#: Attributes by which the layers of the supported families name their shapes.
SHAPES: Final = (
    "hidden_size",
    "num_heads",
    "num_k_heads",
    "num_v_heads",
    "head_dim",
    "head_k_dim",
    "head_v_dim",
)
#: Key of the hash of all weights.
WEIGHTS: Final = "weights_sha256"
#: What is compared, with the words for it.
COMPARED: Final = {
    "type": "type",
    "config_sha256": "hash of the configuration",
    WEIGHTS: "hash of the weights",
}
#: Packages that decide what a model computes.
PACKAGES: Final = ("torch", "transformers")


def model_identity(model: torch.nn.Module, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a plan says of its model, as JSON types.

    Parameters
    ----------
    model : torch.nn.Module
    layers : mapping
        Entries of the plan by name.
    """
    config = getattr(model, "config", None)
    names = dict.fromkeys(layer_name(name) for name in layers)
    return {
        "type": str(getattr(config, "model_type", "")) or type(model).__name__,
        "class": type(model).__name__,
        "config_sha256": _config_digest(config),
        WEIGHTS: weights_digest(model),
        "layers": {name: _shapes(model, name) for name in names},
    }


def _has_float16(model: torch.nn.Module) -> bool:
    return any(parameter.dtype == torch.float16 for parameter in model.parameters())


def versions() -> dict[str, str]:
    """Return the versions of the packages behind a plan, without what tells their builds apart."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return found


def check_identity(plan: object, model: object, force: bool = False) -> None:
    """Refuse a model that the plan was not made for; plans that name no model fit any.

    Raises
    ------
    PlanError
        With what differs, and how to go on.
    """
    known = plan.provenance.get(MODEL) if isinstance(plan, Plan) else None
    if force or not isinstance(known, Mapping) or not isinstance(model, torch.nn.Module):
        return
    # A module without a configuration is refused for what it lacks, where it is used.
    if getattr(model, "config", None) is None:
        return
    differs = _difference(known, model)
    if differs:
        raise PlanError(
            f"the plan was made for another model: {differs}; calibrate this model, or pass force=True "
            "(--force) to go on"
        )


def _difference(known: Mapping[str, Any], model: torch.nn.Module) -> str:
    own = model_identity(model, {})
    for key, what in COMPARED.items():
        planned, given = known.get(key), own[key]
        # Weights that were cast to float16 no longer round to those of float32.
        if key == WEIGHTS and _has_float16(model):
            continue
        # Weights that are offloaded, and keys that a plan lacks, are not compared.
        if planned is not None and given is not None and planned != given:
            return f"the {what} is {_short(planned)} there and {_short(given)} here"
    return ""


def _short(value: Any) -> str:
    return str(value)[:16]


def _config_digest(config: Any) -> str | None:
    as_dict = getattr(config, "to_dict", None)
    if as_dict is None:
        return None
    text = json.dumps(_computing(as_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _computing(value: Any) -> Any:
    """Return a configuration without what only says how the model is loaded."""
    if isinstance(value, Mapping):
        kept = {str(k): v for k, v in value.items() if k not in LOADING and not str(k).startswith("_")}
        return {name: _computing(part) for name, part in kept.items()}
    return value


def _shapes(model: torch.nn.Module, layer: str) -> dict[str, int]:
    module = model.get_submodule(layer)
    found = ((name, getattr(module, name, None)) for name in SHAPES)
    return {name: value for name, value in found if type(value) is int}
