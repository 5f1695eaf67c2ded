"""From one layer's plan to a graph: chooses the lowering and connects its ends."""

from __future__ import annotations

from qinvert.errors import ExportError
from qinvert.export.graph import GraphBuilder
from qinvert.export.interface import GraphInput, Interface
from qinvert.export.lowering import find_lowering
from qinvert.export.lowering.keys import matrix_from_keys
from qinvert.numerics.scales import is_power_of_two
from qinvert.plan.plan import LayerPlan
from qinvert.profiles import Profile
from qinvert.program.steps import BETA, MIN_BETA, Rescale


def lower(plan: LayerPlan, profile: Profile, interface: Interface) -> GraphBuilder:
    """Return the graph of one layer under ``profile``; nothing is written.

    Raises
    ------
    ExportError
        If the profile cannot express the plan, or names a lowering that does not exist.
    """
    _require(profile, plan)
    graph = GraphBuilder()
    lowering = find_lowering(profile.lowering)(plan, profile, interface, graph)
    for name, shape in interface.inputs(plan).items():
        graph.input(name, shape)
    tensor, factors = _matrix(graph, plan, interface), ""
    if plan.program.vectors:
        # As `qinvert.matrices.divided`: one float32 maximum, one float32 division.  Where L
        # comes from keys it was a product with beta just before; what the simulator is
        # given are L and beta, and a beta below the smallest one must scale K as it does there.
        column = interface.inputs(plan)[BETA]
        given = [BETA, graph.scalar("smallest_beta", MIN_BETA)]
        factors = graph.node("Max", given, "beta/floored", column)
        tensor = graph.node("Div", [tensor, factors], "K", interface.square(plan))
    lowering.run(tensor, interface.output_name(plan), factors)
    graph.output(interface.output_name(plan))
    return graph


def _matrix(graph: GraphBuilder, plan: LayerPlan, interface: Interface) -> str:
    """Append what makes M of the graph's inputs, and return its name."""
    if interface.input is GraphInput.M:
        return "M"
    if interface.input is GraphInput.KEYS:
        return matrix_from_keys(graph, plan, interface)
    return graph.node("Mul", ["L", graph.scalar("minus_one", -1.0)], "M/negated", interface.square(plan))


def _require(profile: Profile, plan: LayerPlan) -> None:
    for tensor, quantization in plan.tensors.items():
        if quantization.format not in profile.formats:
            names = ", ".join(f.name for f in profile.formats)
            raise ExportError(
                f"profile {profile.name!r} takes {names}; tensor {tensor!r} is {quantization.format}; "
                "calibrate with other bits or choose another profile"
            )
        if profile.power_of_two_scales and not is_power_of_two(quantization.scale):
            raise ExportError(
                f"profile {profile.name!r} takes power-of-two scales only; tensor {tensor!r} has "
                f"{quantization.scale!r}; calibrate with scales='pow2' or choose another profile"
            )
    for step in plan.program.steps:
        if isinstance(step, Rescale) and profile.power_of_two_scales and not is_power_of_two(step.factor):
            raise ExportError(
                f"profile {profile.name!r} takes power-of-two scales only; step {step.output!r} has the "
                f"factor {step.factor!r}; choose another profile or method"
            )
