"""`qinvert.export`: one layer's plan as an ONNX graph."""

from __future__ import annotations

from os import PathLike
from typing import Any, Final

import onnx

from qinvert import plan_io
from qinvert.arithmetic import is_power_of_two
from qinvert.checks import check_integer
from qinvert.errors import ExportError
from qinvert.export.graph import GraphBuilder
from qinvert.export.integer import IntegerLowering
from qinvert.export.linting import find_faults
from qinvert.export.lowering import GraphLowering
from qinvert.export.qdq import QdqLowering
from qinvert.export.qlinear import QLinearLowering
from qinvert.files import write_atomically
from qinvert.plan import LayerPlan, Plan
from qinvert.profiles import Lowering, Profile, find_profile
from qinvert.steps import BETA, MIN_BETA, Rescale
from qinvert.version import __version__

#: How each kind of graph is written.
LOWERINGS: Final[dict[Lowering, type[GraphLowering]]] = {
    Lowering.QDQ: QdqLowering,
    Lowering.INTEGER: IntegerLowering,
    Lowering.QLINEAR: QLinearLowering,
}
#: Inputs that a graph can start from.
INPUTS: Final = ("L", "M")
#: Largest batch: more matrices than that overflow a graph's constants.
MAX_BATCH: Final = 65536


def export(
    plan: Plan,
    path: str | PathLike[str],
    *,
    profile: str | None = None,
    layer: str | None = None,
    batch: int = 8,
    input: str = "L",  # noqa: A002 - the name in the public contract
) -> onnx.ModelProto:
    """Write ``T = (I + L)^-1`` as a static integer graph.

    The graph maps ``L`` float32 ``[1, batch, C, C]`` to ``T`` float32 of the
    same shape.  Fold batch, heads and chunks of a model into the second axis.
    The graph of a factored plan takes ``beta`` ``[1, batch, C, 1]``, too.

    Parameters
    ----------
    plan : Plan
    path : path
        Of the .onnx file; written atomically.
    profile : str, optional
        Export profile, see `qinvert.profiles`; the plan's target if left out.
    layer : str, optional
        Layer of the plan; may be left out if there is only one.
    batch : int
        Matrices per call.
    input : {"L", "M"}
        ``"M"`` takes -L and saves the sign flip.

    Returns
    -------
    onnx.ModelProto
        The model that was written; equal arguments give equal bytes.

    Raises
    ------
    ExportError
        If the profile cannot express the plan, or an argument is not legal.
    PlanError
        If the layer is unknown.
    """
    model = build(plan, profile=profile, layer=layer, batch=batch, input=input)
    write_atomically(path, serialize(model))
    return model


def build(
    plan: Plan,
    *,
    profile: str | None = None,
    layer: str | None = None,
    batch: int = 8,
    input: str = "L",  # noqa: A002 - as in `export`
) -> onnx.ModelProto:
    """Return the model that `export` writes."""
    chosen = find_profile(plan.target if profile is None else profile)
    layer_plan = plan.layer(layer)
    name = layer if layer is not None else next(iter(plan.layers))
    _check_arguments(batch, input)
    _require(chosen, layer_plan)
    metadata = {
        "qinvert.version": __version__,
        "qinvert.profile": chosen.name,
        "qinvert.layer": name,
        "qinvert.input": input,
        "qinvert.program": layer_plan.program.title,
        "qinvert.requantize": str(layer_plan.requantize),
        "qinvert.plan_sha256": plan_io.sha256(plan),
    }
    model = lower(layer_plan, chosen, batch, input, metadata)
    _ensure(chosen, model)
    return model


def serialize(model: onnx.ModelProto) -> bytes:
    """Return the file content; equal models give equal bytes."""
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def lower(
    plan: LayerPlan, profile: Profile, batch: int, source: str, metadata: dict[str, str]
) -> onnx.ModelProto:
    """Return the graph of one layer under ``profile``; nothing is written."""
    graph = GraphBuilder()
    shape = [1, batch, plan.chunk, plan.chunk]
    tensor = graph.input(source, shape)
    if source == "L":
        tensor = graph.node("Mul", [tensor, graph.scalar("minus_one", -1.0)], "M/negated", shape)
    factors = ""
    if plan.program.vectors:
        # As `qinvert.matrices.divided`: one float32 maximum, one float32 division.
        column = [1, batch, plan.chunk, 1]
        given = [graph.input(BETA, column), graph.scalar("smallest_beta", MIN_BETA)]
        factors = graph.node("Max", given, "beta/floored", column)
        tensor = graph.node("Div", [tensor, factors], "K", shape)
    LOWERINGS[profile.lowering](plan, profile, batch, graph).run(tensor, "T", factors)
    graph.output("T", shape)
    sign = "+" if source == "L" else "-"
    return graph.model("triangular_inverse", profile.opset, metadata, f"T = (I {sign} {source})^-1, {plan}")


def _check_arguments(batch: Any, source: Any) -> None:
    check_integer("batch", batch, 1, MAX_BATCH, ExportError, "; pass the matrices per call")
    if source not in INPUTS:
        raise ExportError(f"input {source!r} is unknown; use {' or '.join(INPUTS)}")


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


def _ensure(profile: Profile, model: onnx.ModelProto) -> None:
    findings = find_faults(model, profile)
    if findings:
        more = f" (and {len(findings) - 1} more)" if findings[1:] else ""
        raise ExportError(f"the graph breaks a rule of profile {profile.name!r}: {findings[0]}{more}")
