"""From one layer's plan to a graph: chooses the lowering and connects its ends."""

from __future__ import annotations

from qinvert.errors import ExportError
from qinvert.export.graph import GraphBuilder
from qinvert.export.interface import GraphInput, Interface
from qinvert.export.lowering import find_lowering
from qinvert.export.lowering.keys import matrix_from_keys
from qinvert.numerics.scales import is_power_of_two
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.profiles import Profile
from qinvert.program.steps import MIN_BETA, Rescale


def lower(plan: QuantizedProgram, profile: Profile, interface: Interface) -> GraphBuilder:
    """Return the graph of one layer under ``profile``; nothing is written.

    Raises
    ------
    ExportError
        If the profile cannot express the plan, or names a lowering that does not exist.
    """
    require(profile, plan)
    graph = GraphBuilder()
    inputs, outputs = interface.inputs(plan), interface.output_names(plan)
    elements = interface.input_elements(plan, profile)
    for name, shape in inputs.items():
        graph.input(name, shape, elements[name])
    given = _inverse_inputs(graph, plan, interface) if plan.program.is_inverse else {n: n for n in inputs}
    lowering = find_lowering(profile.lowering)(plan, profile, interface, graph)
    lowering.run(given, outputs)
    for name in outputs.values():
        graph.output(name)
    return graph


def _inverse_inputs(graph: GraphBuilder, plan: QuantizedProgram, interface: Interface) -> dict[str, str]:
    """Append the nodes that make M, or K and its divisor, of the graph's inputs; return both by port."""
    ports, tensor = plan.program.inverse_ports, _matrix(graph, plan, interface)
    if ports.beta is None:
        return {ports.matrix: tensor}
    # As in `qinvert.matrices.divided`: one float32 maximum and one float32 division.  L from
    # keys was multiplied by beta just before.  It is divided all the same: the simulator is
    # given L and beta, and a beta below the smallest one must scale K as it does there.
    column = interface.inputs(plan)[ports.beta]
    given = [ports.beta, graph.scalar("smallest_beta", MIN_BETA)]
    factors = graph.node("Max", given, "beta/floored", column)
    return {
        ports.matrix: graph.node("Div", [tensor, factors], "K", interface.square(plan)),
        ports.beta: factors,
    }


def _matrix(graph: GraphBuilder, plan: QuantizedProgram, interface: Interface) -> str:
    """Append the nodes that make M of the graph's inputs, and return its name."""
    if interface.input is GraphInput.M:
        return "M"
    if interface.input is GraphInput.KEYS:
        return matrix_from_keys(graph, plan, interface)
    return graph.node("Mul", ["L", graph.scalar("minus_one", -1.0)], "M/negated", interface.square(plan))


def require(profile: Profile, plan: QuantizedProgram) -> None:
    """Refuse formats and scales that a profile does not take.

    Raises
    ------
    ExportError
        With the tensor and the remedy.
    """
    for tensor, quantization in plan.tensors.items():
        if quantization.format.is_float:
            _require_floats(profile, tensor)
        elif quantization.format not in profile.formats:
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


def _require_floats(profile: Profile, tensor: str) -> None:
    if not profile.float_state:
        raise ExportError(
            f"profile {profile.name!r} has no float32 between integers, but tensor {tensor!r} is carried so; "
            "calibrate with state_bits=16 or error_feedback, or choose another profile, such as npu-qdq-int16"
        )
