"""What exported graphs say of themselves."""

from __future__ import annotations

from qinvert.export.interface import GraphInput, Interface
from qinvert.export.step_interface import StepInterface
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.profiles import Profile
from qinvert.version import __version__


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
        "qinvert.layer": name,
        "qinvert.program": plan.program.title,
        "qinvert.requantize": str(plan.requantize),
        **interface.metadata(plan, profile),
        **({"qinvert.session_options": " ".join(profile.session_options)} if profile.session_options else {}),
    }


def describe(plan: LayerPlan, interface: Interface | StepInterface) -> str:
    """One line for readers of a graph."""
    if isinstance(interface, StepInterface) or not plan.program.is_inverse:
        return str(plan)
    sign = "-" if interface.input is GraphInput.M else "+"
    matrix = "M" if interface.input is GraphInput.M else "L"
    return f"T = (I {sign} {matrix})^-1, {plan}"
