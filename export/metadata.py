"""What exported graphs say of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qinvert.export.interface import GraphInput, Interface
from qinvert.export.step_interface import StepInterface
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.profiles import Profile
from qinvert.version import __version__

#: Key of a layer's name; ``qinvert.layer/NAME`` in the metadata of whole graphs.
LAYER: Final = "qinvert.layer"


def provenance(plan: Plan, profile: Profile) -> dict[str, str]:
    """Metadata about a whole file."""
    return {
        "qinvert.version": __version__,
        "qinvert.profile": profile.name,
        "qinvert.plan_sha256": plan.sha256,
    }


def layer_metadata(
    name: str, plan: LayerPlan, profile: Profile, interface: Interface | StepInterface
) -> dict[str, str]:
    """Metadata about one layer."""
    return {
        LAYER: name,
        "qinvert.program": plan.program.title,
        "qinvert.requantize": str(plan.requantize),
        **interface.metadata(plan, profile),
        **({"qinvert.session_options": " ".join(profile.session_options)} if profile.session_options else {}),
    }


def graph_metadata(layer: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a layer as those of a whole graph: its name is a key, ``qinvert.layer/NAME``.

    `onnx.compose.merge_models` refuses two graphs that give one key different values.
    """
    name, program = layer[LAYER], layer["qinvert.program"]
    rest = {key: value for key, value in layer.items() if key not in (LAYER, "qinvert.program")}
    return {f"{LAYER}/{name}": program, **rest}


def layer_in(metadata: Mapping[str, str]) -> str | None:
    """Return the layer that a graph or function names; None if it names none, or several."""
    named = [key.removeprefix(f"{LAYER}/") for key in metadata if key.startswith(f"{LAYER}/")]
    return named[0] if len(named) == 1 else metadata.get(LAYER)


def describe(plan: LayerPlan, interface: Interface | StepInterface) -> str:
    """One line for readers of a graph."""
    if isinstance(interface, StepInterface) or not plan.program.is_inverse:
        return str(plan)
    sign = "-" if interface.input is GraphInput.M else "+"
    matrix = "M" if interface.input is GraphInput.M else "L"
    return f"T = (I {sign} {matrix})^-1, {plan}"
