"""`qinvert.export`: one layer's plan as an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Unpack, cast

import onnx

from qinvert.checks import check_integer
from qinvert.errors import ExportError
from qinvert.export.graph import IR_VERSION, GraphBuilder
from qinvert.export.interface import AUTO, GraphInput, GraphOutput, InputType, Interface, Options
from qinvert.export.layer_graph import lower
from qinvert.export.metadata import describe, graph_metadata, layer_metadata, provenance
from qinvert.export.rules.lint import find_faults
from qinvert.export.step_graph import is_step, lower_step, refuse_step_options, step_interface
from qinvert.export.step_heads import heads_interface, heads_metadata, layer_plans, lower_heads
from qinvert.export.step_interface import StepInterface
from qinvert.files import write_atomically
from qinvert.hardware import HARDWARE, Hardware, find_hardware
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.profiles import Profile, find_profile


def export(
    plan: Plan,
    path: str | PathLike[str],
    *,
    profile: str | None = None,
    layer: str | None = None,
    batch: int | str = AUTO,
    input: str = AUTO,  # noqa: A002 - the name in the public contract
    output: str = AUTO,
    key_size: int | None = None,
    input_type: str = InputType.FLOAT32,
    chains: int | str = AUTO,
    heads: int | None = None,
    chunks: int | None = None,
    layout: str | None = None,
    normalize: bool | None = None,
    states: str | None = None,
    opset: int | None = None,
    ir_version: int | None = None,
) -> onnx.ModelProto:
    """Write ``T = (I + L)^-1`` as a static integer graph, or a whole chunk step.

    The graph maps ``L`` float32 ``[1, batch, C, C]`` to ``T`` float32 of the
    same shape.  Fold batch, heads and chunks of a model into the second axis.
    The graph of a factored plan also takes ``beta`` ``[1, batch, C, 1]``.

    Where the program is a chunk step, the graph maps ``q, k [batch, heads, T, Dk]``,
    ``v [batch, heads, T, Dv]``, ``beta`` and ``g [batch, heads, T]``, ``valid [batch, T]``
    (1 for tokens, 0 for padding) and ``state [batch, heads, Dk, Dv]`` to ``o`` and
    ``state_out``, with ``T = chunks C``.  g is ``[.., Dk]`` with one decay per channel.

    Parameters
    ----------
    plan : Plan
    path : path
        Path of the .onnx file, which is written atomically.
    profile : str, optional
        Export profile, see `qinvert.profiles`; the plan's target if left out.
    layer : str, optional
        Layer of the plan; may be left out if there is only one.
    batch : int or "auto"
        Matrices per call, 8 by default; sequences per call of a chunk step, 1 by default.
    input : {"auto", "L", "M", "keys", "ports"}
        ``"auto"`` means ``"L"``, or ``"ports"`` where the program does not compute
        an inverse.  ``"ports"`` takes the program's inputs by their names, float32
        ``[1, batch, rows, columns]``.  ``"M"`` takes -L and saves the sign flip.
        ``"keys"`` takes ``k`` ``[1, batch, C, key_size]`` (as it enters the product:
        normalize it first), ``beta`` and ``g`` (log decay of each token, <= 0), both
        ``[1, batch, C, 1]``, and builds L in float32: `qinvert.export.lowering.keys`.
    output : {"auto", "T", "integers", "ports"}
        ``"auto"`` means ``"T"``, or ``"ports"`` as for ``input``; an output with
        the name of an input is called ``NAME_out``.  ``"integers"`` returns the
        integers of the program's result instead, as the profile stores them:
        ``S`` of ``T = I + S``, ``W`` of ``T = I + beta W`` for factored plans, or
        T itself where the program holds the identity.  So ``T V = V + scale (S V)``
        stays an integer product.  Scale and zero point are static, so they are not
        a second output, but the metadata ``qinvert.output_scale`` and
        ``qinvert.output_zero_point``.
    key_size : int, optional
        Length of a key, for ``input="keys"``.
    input_type : {"float32", "integers"}
        ``"integers"`` takes M, for ``input="M"``, or the matrices of ``"ports"`` as
        integers on the plan's grid, stored as the profile stores them at the ends of
        graphs: for a host whose M is already on the grid.  Scale and zero point are
        the metadata ``qinvert.input_scale`` and ``qinvert.input_zero_point``.
    chains : int or "auto"
        Independent parts into which the graph cuts the batch, and which it joins at
        the end: on some chips elementwise work of one part runs beside products of
        another.  The values do not depend on it.  ``"auto"`` takes what costs the least
        on the plan's chip, see `qinvert.hardware`; for chunk steps, whose parts are heads, all heads
        apart on Hexagon and 1 elsewhere.
    heads : int, optional
        Heads of a chunk step, where the plan does not say their number.
    chunks : int, optional
        Chunks per call of a chunk step, 1 by default.
    layout : {"tokens_first", "values_first"}, optional
        Order of the last two axes of v, o and the state; see `qinvert.export.step_interface.Layout`.
    normalize : bool, optional
        Whether q and k of a chunk step are raw: the graph gives them norm 1 and scales q, in float32.
    states : {"last", "every"}, optional
        Whether a chunk step also returns the state behind each chunk: ``state_1``, ``state_2``, ...
    opset, ir_version : int, optional
        Operator set and IR version of the graph, to fit a graph that it is merged with by
        `onnx.compose`; those of the profile, and 9, by default.

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
    model = build(
        plan,
        profile=profile,
        layer=layer,
        batch=batch,
        input=input,
        output=output,
        key_size=key_size,
        input_type=input_type,
        chains=chains,
        heads=heads,
        chunks=chunks,
        layout=layout,
        normalize=normalize,
        states=states,
        opset=opset,
        ir_version=ir_version,
    )
    write_atomically(path, serialize(model))
    return model


def build(
    plan: Plan, *, profile: str | None = None, layer: str | None = None, **options: Unpack[Options]
) -> onnx.ModelProto:
    """Return the model that `export` writes."""
    chosen = with_opset(profile_for(plan, profile), options.get("opset"))
    ir_version = ir_version_for(options.get("ir_version"), IR_VERSION)
    plans = layer_plans(plan, layer)
    layer_plan, name = plans[0], layer if layer is not None else next(iter(plan.layers))
    if options.get("batch", 1) is None:
        raise ExportError("batch None is for export_layers only; pass the matrices per call, for example 8")
    if len(plans) > 1:
        return _model_of_heads(plan, name, plans, chosen, heads_interface(plans, options), ir_version)
    if is_step(layer_plan):
        step = step_interface(layer_plan, options, hardware_for(plan, chosen))
        return _model(plan, name, layer_plan, chosen, step, lower_step(layer_plan, chosen, step), ir_version)
    interface = interface_of(plan, layer_plan, chosen, **options)
    return _model(plan, name, layer_plan, chosen, interface, lower(layer_plan, chosen, interface), ir_version)


def _model_of_heads(
    plan: Plan,
    name: str,
    plans: Sequence[LayerPlan],
    chosen: Profile,
    step: StepInterface,
    ir_version: int,
) -> onnx.ModelProto:
    said = heads_metadata(plans, chosen, step)
    return _model(plan, name, plans[0], chosen, step, lower_heads(plans, chosen, step), ir_version, said)


def _model(
    plan: Plan,
    name: str,
    layer_plan: LayerPlan,
    chosen: Profile,
    interface: Interface | StepInterface,
    graph: GraphBuilder,
    ir_version: int,
    ends: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    said = graph_metadata({**layer_metadata(name, layer_plan, chosen, interface), **(ends or {})})
    model = graph.model(
        _graph_name(layer_plan),
        chosen.opset,
        provenance(plan, chosen) | said,
        describe(layer_plan, interface),
        ir_version=ir_version,
    )
    ensure(chosen, model)
    return model


def _graph_name(plan: QuantizedProgram) -> str:
    return "triangular_inverse" if plan.program.is_inverse else plan.program.name


def interface_of(plan: Plan, layer: LayerPlan, profile: Profile, **options: Unpack[Options]) -> Interface:
    """Return checked options of `export` for one layer, with the defaults of an inverse or of other programs.

    Raises
    ------
    ExportError
        If one of them is not legal.
    """
    refuse_step_options(layer, options)
    if is_step(layer):
        raise ExportError(
            f"{layer.program.name} is a whole chunk step, whose graph has ends of its own; write one file "
            "per layer by qinvert.export"
        )
    inverse = layer.program.is_inverse
    source, result = options.get("input", AUTO), options.get("output", AUTO)
    if source == AUTO:
        source = GraphInput.L if inverse else GraphInput.PORTS
    if result == AUTO:
        result = GraphOutput.T if inverse else GraphOutput.PORTS
    batch = options.get("batch", AUTO)
    whole = Interface(
        batch=8 if batch == AUTO else cast("int | None", batch),
        input=cast("GraphInput", source),
        output=cast("GraphOutput", result),
        key_size=options.get("key_size"),
        input_type=cast("InputType", options.get("input_type", InputType.FLOAT32)),
    )
    chains = options.get("chains", AUTO)
    if chains == AUTO:
        chains = _cheapest_chains(plan, layer, profile, whole.batch)
    return replace(whole, chains=cast("int", chains))


def _cheapest_chains(plan: Plan, layer: LayerPlan, profile: Profile, batch: int | None) -> int:
    """Return the chains that cost the least on the plan's chip or on the profile's; 1 if none is known."""
    known, hardware = _planned_chip(plan) is not None, hardware_for(plan, profile)
    if batch is None or hardware is None:
        return 1
    chosen = layer.provenance.get("chains")
    if known and type(chosen) is int and chosen > 0 and plan.provenance.get("batch") == batch:
        # What calibration chose, perhaps by the compiler.
        return chosen if batch % chosen == 0 else 1
    return hardware.best_chains(layer, batch)[0]


def hardware_for(plan: Plan, profile: Profile) -> Hardware | None:
    """Return the plan's chip, else the profile's; None if none is known."""
    name = _planned_chip(plan) or profile.hardware
    return find_hardware(name) if name else None


def _planned_chip(plan: Plan) -> str | None:
    """Return the chip whose costs chose the plan, where it names one that is known here."""
    named = plan.provenance.get("hardware")
    return named if isinstance(named, str) and named in HARDWARE else None


def profile_for(plan: Plan, name: str | None) -> Profile:
    """Return the profile of that name, the plan's target if it is None.

    Raises
    ------
    ExportError
        If there is no profile of that name.
    """
    return find_profile(plan.target if name is None else name)


def with_opset(profile: Profile, opset: int | None) -> Profile:
    """Return the profile for graphs of another operator set, None for its own.

    Raises
    ------
    ExportError
        If its types are not in that set, or onnx does not know it.
    """
    if opset is None:
        return profile
    # Quantization by a scale of a tensor came with 13, that onto 16 bits with 21.
    wide = any(not element.endswith("int8") for element in profile.stored)
    least, most = min(profile.opset, 21 if wide else 13), onnx.defs.onnx_opset_version()
    check_integer("opset", opset, least, most, ExportError, f"; profile {profile.name!r} is for these")
    return replace(profile, opset=opset)


def ir_version_for(version: int | None, least: int) -> int:
    """Return the IR version of a graph, ``least`` for None.

    Raises
    ------
    ExportError
        If it is older than 4, where constants need not be inputs, or newer than onnx.
    """
    if version is None:
        return least
    check_integer("ir_version", version, 4, onnx.IR_VERSION, ExportError, "; pass that of the host")
    return version


def serialize(model: onnx.ModelProto) -> bytes:
    """Return the file content; equal models give equal bytes."""
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def ensure(profile: Profile, model: onnx.ModelProto) -> None:
    """Refuse a graph that breaks a rule of its profile.

    Raises
    ------
    ExportError
        If there is a finding; the message has the first one.
    """
    findings = find_faults(model, profile)
    if findings:
        more = f" (and {len(findings) - 1} more)" if findings[1:] else ""
        raise ExportError(f"the graph breaks a rule of profile {profile.name!r}: {findings[0]}{more}")
