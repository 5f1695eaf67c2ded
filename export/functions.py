"""`qinvert.export_layers`: one ONNX model with a local function per layer."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from os import PathLike
from typing import Final, Unpack

import onnx
import onnx.inliner

from qinvert.errors import ExportError
from qinvert.export.exporting import (
    ensure,
    interface_of,
    ir_version_for,
    profile_for,
    serialize,
    with_opset,
)
from qinvert.export.graph import DOMAIN, FUNCTION_IR_VERSION, IR_VERSION, MAX_BYTES, GraphBuilder
from qinvert.export.interface import AUTO, InputType, Interface, Options
from qinvert.export.layer_graph import lower
from qinvert.export.metadata import describe, layer_metadata, provenance
from qinvert.export.reading import inlined, parse_model
from qinvert.files import read_bytes, write_atomically
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.profiles import Profile

#: What the names of functions start with.
FUNCTION_PREFIX: Final = "TriInv_"
#: Metadata that says how many layers a model has functions of.
LAYERS: Final = "qinvert.layers"


def export_layers(
    plan: Plan,
    path: str | PathLike[str],
    *,
    profile: str | None = None,
    layers: Sequence[str] | None = None,
    batch: int | None = 8,
    input: str = AUTO,  # noqa: A002 - as in `qinvert.export`
    output: str = AUTO,
    key_size: int | None = None,
    input_type: str = InputType.FLOAT32,
    chains: int | str = AUTO,
    opset: int | None = None,
    ir_version: int | None = None,
    inline: bool = False,
) -> onnx.ModelProto:
    """Write one model whose graph calls a local function for each layer.

    The function of a layer is its integer program, called ``TriInv_LAYER`` in
    the domain ``qinvert``; the graph has the inputs and outputs ``LAYER/L``,
    ``LAYER/T`` and so on.  A function needs no constants from outside: its
    scales are Constant nodes, which `onnx.inliner.inline_local_functions`
    leaves as constants of the inlined graph.  onnxruntime inlines by itself;
    OpenVINO does not read local functions.

    Parameters
    ----------
    plan : Plan
    path : path
        Path of the .onnx file, which is written atomically.
    profile : str, optional
        Export profile; the plan's target if left out.
    layers : sequence of str, optional
        Layers to export, in this order; all layers of the plan if left out.
    batch : int or None
        Matrices per call.  None leaves the batch open: for onnxruntime, or to
        be called by a larger model; compilers for NPUs want a number.
    input, output, key_size, input_type, chains
        As in `qinvert.export`, for all layers.
    opset, ir_version : int, optional
        As in `qinvert.export`; models with functions have at least IR version 10.
    inline : bool
        Write plain nodes in the place of functions, as OpenVINO and `onnx.compose` want.

    Returns
    -------
    onnx.ModelProto
        The model that was written; equal arguments give equal bytes.

    Raises
    ------
    ExportError
        If the profile cannot express a layer, or an argument is not legal.
    PlanError
        If a layer is unknown.
    """
    model = build_layers(
        plan,
        profile=profile,
        layers=layers,
        batch=batch,
        input=input,
        output=output,
        key_size=key_size,
        input_type=input_type,
        chains=chains,
        opset=opset,
        ir_version=ir_version,
        inline=inline,
    )
    write_atomically(path, serialize(model))
    return model


def build_layers(
    plan: Plan,
    *,
    profile: str | None = None,
    layers: Sequence[str] | None = None,
    inline: bool = False,
    **options: Unpack[Options],
) -> onnx.ModelProto:
    """Return the model that `export_layers` writes."""
    chosen = with_opset(profile_for(plan, profile), options.get("opset"))
    ir_version = ir_version_for(options.get("ir_version"), IR_VERSION if inline else FUNCTION_IR_VERSION)
    if not inline and ir_version < FUNCTION_IR_VERSION:
        raise ExportError(
            f"ir_version {ir_version} has no typed functions; use {FUNCTION_IR_VERSION}, or inline=True"
        )
    names = _checked(plan, layers)
    functions = []
    graph = GraphBuilder()
    for layer, name in function_names(names).items():
        layer_plan = plan.layer(layer)
        interface = interface_of(plan, layer_plan, chosen, **options)
        functions.append(layer_function(layer_plan, chosen, interface, name=name, layer=layer))
        if sum(function.ByteSize() for function in functions) > MAX_BYTES:
            raise ExportError(
                f"the constants of the layers exceed {MAX_BYTES >> 20} MiB; export a smaller batch or one "
                "file per layer"
            )
        _append_call(graph, functions[-1], layer_plan, chosen, interface, layer)
    metadata = provenance(plan, chosen) | {LAYERS: str(len(names))}
    doc = f"T = (I + L)^-1 of {len(names)} layers"
    model = graph.model("triangular_inverses", chosen.opset, metadata, doc, functions)
    if inline:
        model = inlined(model)
        kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(kept)
    model.ir_version = ir_version
    if options.get("batch", 8) is not None:
        # The rules are those of compilers, which do not take an open batch.
        ensure(chosen, inlined(model))
    return model


def layer_function(
    plan: LayerPlan, profile: Profile, interface: Interface, *, name: str, layer: str
) -> onnx.FunctionProto:
    """Return one layer's integer program as a function of the domain ``qinvert``.

    Inputs and outputs are those of `Interface`; its operator set is the
    profile's.  ``layer`` is what the metadata calls the layer.

    Raises
    ------
    ExportError
        If the profile cannot express the plan.
    """
    metadata = layer_metadata(layer, plan, profile, interface)
    return lower(plan, profile, interface).function(name, profile.opset, metadata, describe(plan, interface))


def function_names(layers: Sequence[str], taken: Collection[str] = ()) -> dict[str, str]:
    """Return a readable, unique C identifier for each layer, none of those that are ``taken``."""
    names: dict[str, str] = {}
    taken = set(taken)
    for i, layer in enumerate(layers):
        name = FUNCTION_PREFIX + (re.sub(r"[^A-Za-z0-9]+", "_", layer).strip("_")[:100] or f"layer_{i}")
        while name in taken:
            name = f"{name}_{i}"
        taken.add(name)
        names[layer] = name
    return names


def single_layer(model: onnx.ModelProto, layer: str | None) -> onnx.ModelProto:
    """Return the inlined graph of one layer of `export_layers`; any other model as it is.

    Its inputs and outputs have the names that `qinvert.export` gives them.

    Raises
    ------
    ExportError
        If the model does not call the layer's function, or is that of several layers, inlined.
    """
    if not model.functions:
        _refuse_inlined(model, "the model")
        return model
    calls = {node.name: node for node in model.graph.node if node.domain == DOMAIN}
    name = layer if layer is not None or len(calls) != 1 else next(iter(calls))
    functions = {function.name: function for function in model.functions}
    if name not in calls or calls[name].op_type not in functions:
        raise ExportError(f"the model does not call layer {name!r}; it has {', '.join(calls) or 'none'}")
    call, function = calls[name], functions[calls[name].op_type]
    single = onnx.ModelProto()
    single.CopyFrom(model)
    graph = single.graph
    graph.ClearField("node")
    graph.node.append(onnx.helper.make_node(function.name, function.input, function.output, domain=DOMAIN))
    for values, outer, inner in (
        (graph.input, call.input, function.input),
        (graph.output, call.output, function.output),
    ):
        renamed = dict(zip(outer, inner, strict=False))
        kept = [value for value in values if value.name in renamed]
        for value in kept:
            value.name = renamed[value.name]
        del values[:]
        values.extend(kept)
    single.metadata_props.extend(function.metadata_props)
    return inlined(single)


def called_layers(path: str | PathLike[str]) -> list[str]:
    """Layers whose functions a model of `export_layers` calls.

    Raises
    ------
    ExportError
        If it is not an ONNX model, or its functions were inlined.
    """
    model = parse_model(read_bytes(path), path)
    _refuse_inlined(model, os.fspath(path))
    return [node.name for node in model.graph.node if node.domain == DOMAIN]


def _refuse_inlined(model: onnx.ModelProto, name: str) -> None:
    """Refuse a model of all layers without calls: what its layers take and return stood on its functions."""
    of_layers = any(entry.key == LAYERS for entry in model.metadata_props)
    if of_layers and not any(node.domain == DOMAIN for node in model.graph.node):
        raise ExportError(
            f"{name} has plain nodes in the place of its layers' functions, and cannot be "
            "verified layer by layer; verify an export without --inline (inline=True), whose functions hold "
            "the same nodes"
        )


def _append_call(
    graph: GraphBuilder,
    function: onnx.FunctionProto,
    plan: LayerPlan,
    profile: Profile,
    interface: Interface,
    layer: str,
) -> None:
    shapes, types = interface.inputs(plan), interface.input_elements(plan, profile)
    inputs = [graph.input(f"{layer}/{name}", shapes[name], types[name]) for name in function.input]
    elements = interface.elements(plan, profile)
    results = {f"{layer}/{name}": (shape, elements[name]) for name, shape in interface.outputs(plan).items()}
    graph.call(function, inputs, layer, results)
    for name in results:
        graph.output(name)


def _checked(plan: Plan, layers: Sequence[str] | None) -> list[str]:
    names = list(plan.layers) if layers is None else list(layers)
    for name in names:
        plan.layer(name)
    if not names or len(set(names)) < len(names):
        raise ExportError(f"layers {names} are empty or name one twice; leave them out for all")
    return names
