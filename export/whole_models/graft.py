"""`qinvert.graft`: integer programs for the LinearAttention nodes of a model that others exported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Final

import onnx
import onnx.inliner
from onnx import helper

from qinvert.calibration.head_names import is_split, layer_name
from qinvert.calibration.heads import in_layer_order
from qinvert.errors import ExportError, PlanError, reason
from qinvert.export.exporting import profile_for
from qinvert.export.graph import DOMAIN
from qinvert.export.open_shapes import set_shapes
from qinvert.export.whole_models.chunked_nodes import ChunkedNodes
from qinvert.export.whole_models.export_model import save
from qinvert.export.whole_models.linear_attention_nodes import (
    LinearAttention,
    find_nodes,
    known_values,
    load,
    refuse_hidden,
    set_aside,
    weight_files,
)
from qinvert.export.whole_models.tracing import (
    FIRST_OPSET,
    attach_functions,
    require_onnx_ir,
)
from qinvert.files import check_readable, check_target
from qinvert.plan.plan import Plan

#: Start of the names of functions that take a node's place until they are inlined.
PREFIX: Final = "DeltaRule_"


def graft(
    source: str | PathLike[str],
    plan: Plan,
    path: str | PathLike[str],
    *,
    profile: str | None = None,
    layers: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Replace ``LinearAttention`` nodes by chunks whose inverse is the plan's integer program.

    Both operators of that name are known, that of onnxruntime (``com.microsoft``)
    and that of ONNX 27, with the update rules ``delta`` and ``gated_delta``.  Nodes
    of other rules have no inverse and stay.  Nodes in branches, loops and local
    functions are refused, unless ``layers`` names the nodes that are meant.
    Inputs, outputs and states keep their meaning, for every length.  The new
    nodes are MatMul and other plain operators, one Scan over chunks and one call
    of a local function ``TriInv_LAYER`` for each node; where the model already has
    a function of that name, the new one gets another name.  A step of a single
    token costs as much as a whole chunk, so graft models that run prompts.

    The host's operator sets stay, and so does its IR version, unless that is older than
    local functions (8).  `qinvert.export.whole_models.graft_check.compare_graft` says how
    far the outputs are from the host's.

    Parameters
    ----------
    source : path
        An ONNX model.
    plan : Plan
    path : path
        Where to write, not ``source`` itself; weights beyond 1 GiB go to ``PATH.XXXXXXXX.data``.
    profile : str, optional
        Export profile of the functions; the plan's target if left out.
    layers : mapping, optional
        Layer of the plan for every node by its name.  By default nodes and
        layers go together in their order, layers whose names differ in
        numbers only by these, or a single layer with all nodes.

    Returns
    -------
    onnx.ModelProto
        The model that was written.

    Raises
    ------
    ExportError
        If there is no such node, one has an option that chunks cannot keep,
        or the profile cannot express the plan.
    PlanError
        If nodes and layers do not go together.
    MissingDependencyError
        If onnxscript is not installed.
    """
    ir = require_onnx_ir()
    chosen = profile_for(plan, profile)
    check_readable(source)
    check_target(path)
    inputs = {os.path.realpath(source), *weight_files(source)}
    if any(_is_same(path, other) for other in inputs):
        raise ExportError(f"{path} is the model itself, or holds its weights; write to another file")
    model = load(source)
    opset = _opset(model)
    found = find_nodes(model)
    if layers is None:
        refuse_hidden(model)
    # Of an earlier graft, perhaps of another plan with layers of the same names.
    taken = {function.name for function in model.functions if function.domain == DOMAIN}
    weights = set_aside(model)
    set_shapes(model, known_values(model, found.values()))
    chunked, functions = ChunkedNodes(plan, taken, opset), []
    for i, (node, layer) in enumerate(_assigned(found, plan, layers).items()):
        functions.append(_free(f"{PREFIX}{i}", model))
        _replace(model, found[node], chunked.function(found[node], layer, functions[-1]))
    model = _inlined(model, functions)
    try:
        result = ir.serde.deserialize_model(model)
    except Exception as error:  # onnx_ir raises its own types, and those of what it finds
        raise ExportError(f"{source} cannot be read as a whole ({reason(error)})") from None
    for name, tensor in weights.items():
        result.graph.initializers[name].const_value = ir.serde.deserialize_tensor(tensor)
    attach_functions(result, plan, chosen, taken)
    return save(result, path, kept=inputs)


def _is_same(path: str | PathLike[str], other: str) -> bool:
    """Whether two paths are one file, by whatever links."""
    try:
        return Path(path).samefile(other)
    except OSError:
        # One of them is not there.
        return os.path.realpath(path) == other


def _opset(model: onnx.ModelProto) -> int:
    found = {entry.domain: entry.version for entry in model.opset_import}
    version: int = found.get("", 0)
    if version < FIRST_OPSET:
        raise ExportError(
            f"the model has operator set {version}; convert it to {FIRST_OPSET} or later "
            "(onnx.version_converter)"
        )
    newest = onnx.defs.onnx_opset_version()
    if version > newest:
        raise ExportError(f"the model has operator set {version}, but onnx knows {newest}; upgrade onnx")
    return version


def _assigned(
    nodes: Mapping[str, LinearAttention], plan: Plan, layers: Mapping[str, str] | None
) -> dict[str, str]:
    entries = list(dict.fromkeys(map(layer_name, plan.layers)))
    if layers is not None:
        for node, layer in layers.items():
            if node not in nodes:
                raise PlanError(f"the model has no node {node!r} to graft; it has {', '.join(nodes)}")
            if layer not in plan.layers and not is_split(plan, layer):
                raise PlanError(f"the plan has no layer {layer!r}; it has {', '.join(entries)}")
        return dict(layers)
    if len(entries) == 1:
        entries *= len(nodes)
    if len(entries) != len(nodes):
        raise PlanError(
            f"the model has {len(nodes)} nodes ({', '.join(nodes)}), but the plan has {len(entries)} layers "
            f"({', '.join(entries)}); say which node has which layer"
        )
    return dict(zip(nodes, in_layer_order(entries), strict=True))


def _replace(model: onnx.ModelProto, node: LinearAttention, function: onnx.FunctionProto) -> None:
    """Put a call of the function in a node's place; what it calls is attached later."""
    call = helper.make_node(
        function.name, list(node.inputs.values()), list(node.node.output), name=node.node.name, domain=DOMAIN
    )
    # An operator has as many outputs as its caller wants; a function always has all of its outputs.
    call.output.extend(f"{function.name}/{name}" for name in function.output[len(call.output) :])
    position = list(model.graph.node).index(node.node)
    model.graph.node.insert(position, call)
    del model.graph.node[position + 1]
    model.functions.append(function)


def _free(name: str, model: onnx.ModelProto) -> str:
    """Return a name that no function of the model has."""
    names = {function.name for function in model.functions}
    while name in names:
        name += "_"
    return name


def _inlined(model: onnx.ModelProto, functions: Sequence[str]) -> onnx.ModelProto:
    """Inline the functions of all nodes in one pass; what they call is attached later."""
    if DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return onnx.inliner.inline_selected_functions(model, [(DOMAIN, name) for name in functions])
