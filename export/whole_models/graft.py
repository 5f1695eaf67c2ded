"""`qinvert.graft`: integer programs for the LinearAttention nodes of a model that others exported."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Final

import onnx
import onnx.inliner
import torch
from onnx import helper

from qinvert.calibration.heads import in_layer_order, is_split, layer_name
from qinvert.delta_rule.rule import chunk_gated_delta_rule
from qinvert.errors import ExportError, PlanError, reason
from qinvert.export.exporting import profile_for
from qinvert.export.functions import function_names
from qinvert.export.graph import DOMAIN, FUNCTION_IR_VERSION
from qinvert.export.whole_models.export_model import BATCH, EXAMPLE_CHUNKS, SEQUENCE, chunk_of, save
from qinvert.export.whole_models.linear_attention_nodes import (
    LinearAttention,
    find_nodes,
    load,
    refuse_hidden,
    set_aside,
)
from qinvert.export.whole_models.tracing import (
    FIRST_OPSET,
    attach_functions,
    calls_of,
    require_onnx_ir,
    trace,
)
from qinvert.files import check_writable
from qinvert.plan.plan import Plan

#: Last operator set that PyTorch's exporter converts to by itself.
LAST_OPSET: Final = 25
#: Sequences that a node is traced with.
SEQUENCES: Final = 2
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
    if os.path.realpath(source) == os.path.realpath(path):
        raise ExportError(f"{path} is the model itself; write to another file")
    check_writable(path)
    model = load(source)
    opset = _opset(model)
    found = find_nodes(model)
    if layers is None:
        refuse_hidden(model)
    # Of an earlier graft, perhaps of another plan with layers of the same names.
    taken = {function.name for function in model.functions if function.domain == DOMAIN}
    weights = set_aside(model)
    for node, layer in _assigned(found, plan, layers).items():
        _replace(model, found[node], _Chunked(found[node], plan, layer, taken), layer, opset)
    model.ir_version = max(model.ir_version, FUNCTION_IR_VERSION)
    try:
        result = ir.serde.deserialize_model(model)
    except Exception as error:  # onnx_ir raises its own types, and those of what it finds
        raise ExportError(f"{source} cannot be read as a whole ({reason(error)})") from None
    for name, tensor in weights.items():
        result.graph.initializers[name].const_value = ir.serde.deserialize_tensor(tensor)
    attach_functions(result, plan, chosen, taken)
    return save(result, path)


def _opset(model: onnx.ModelProto) -> int:
    found = {entry.domain: entry.version for entry in model.opset_import}
    version: int = found.get("", found.get("ai.onnx", 0))
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


class _Chunked(torch.nn.Module):
    """A LinearAttention node as our chunked delta rule; inputs and outputs are the node's."""

    def __init__(self, node: LinearAttention, plan: Plan, layer: str, taken: Collection[str]) -> None:
        super().__init__()
        self.node = node
        self.chunk = chunk_of(plan)
        self.inverse = partial(calls_of(plan, taken), layer)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past_state: torch.Tensor | None = None,
        decay: torch.Tensor | None = None,
        beta: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        node = self.node
        q, k = _by_head(query, node.query_heads), _by_head(key, node.key_heads)
        v = _by_head(value, node.value_heads)
        assert beta is not None
        beta = beta.expand(*v.shape[:3])
        g = torch.zeros_like(beta) if decay is None else decay
        if g.shape[-1] != node.value_heads:
            g = _by_head(g, node.value_heads)
        # The function shares queries and keys among values; where queries share values, values repeat.
        heads, shared = max(q.shape[2], v.shape[2]), max(1, node.query_heads // node.value_heads)
        v, g, beta = (x.repeat_interleave(shared, dim=2) for x in (v, g, beta))
        if q.shape[2] != k.shape[2]:
            q, k = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
        out, state = chunk_gated_delta_rule(
            q if node.scale is None else q * (node.scale * node.key_size**0.5),
            k,
            v,
            g,
            beta,
            chunk_size=self.chunk,
            initial_state=None if past_state is None else past_state.repeat_interleave(shared, dim=1),
            output_final_state=True,
            chunk_inverse=self.inverse,
        )
        assert state is not None
        return out.flatten(2), state[:, ::shared].to(node.state_element)


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.reshape(*x.shape[:-1], heads, -1)


def _replace(
    model: onnx.ModelProto, node: LinearAttention, chunked: _Chunked, layer: str, opset: int
) -> None:
    """Put the chunks in a node's place; what they call is attached later."""
    function = _function(node, chunked, layer, opset)
    call = helper.make_node(
        function.name, list(node.inputs.values()), list(node.node.output), name=node.node.name, domain=DOMAIN
    )
    # An operator has as many outputs as its caller wants; a function always has all of its outputs.
    call.output.extend(f"{function.name}/{name}" for name in function.output[len(call.output) :])
    position = list(model.graph.node).index(node.node)
    model.graph.node.insert(position, call)
    del model.graph.node[position + 1]
    model.functions.append(function)
    if DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    model.CopyFrom(onnx.inliner.inline_selected_functions(model, [(DOMAIN, function.name)]))


def _function(node: LinearAttention, chunked: _Chunked, layer: str, opset: int) -> onnx.FunctionProto:
    example = node.example(SEQUENCES, EXAMPLE_CHUNKS * chunked.chunk)
    axes = {0: torch.export.Dim(BATCH), 1: torch.export.Dim(SEQUENCE)}
    shapes = {name: {0: axes[0]} if name == "past_state" else axes for name in example}
    traced = trace(chunked.eval(), example, min(opset, LAST_OPSET), dynamic_shapes=shapes)
    graph = require_onnx_ir().serde.serialize_model(traced).graph
    _forget_shapes(graph)
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in graph.initializer
    ]
    nodes = [*constants, *graph.node]
    _check_versions(nodes, opset)
    return helper.make_function(
        DOMAIN,
        PREFIX + function_names([layer])[layer],
        [value.name for value in graph.input],
        [value.name for value in graph.output],
        nodes,
        [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)],
    )


def _forget_shapes(graph: onnx.GraphProto) -> None:
    """Drop the sizes of a trace, whose names could be those of the model."""
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget_shapes(attribute.g)
                for value in (*attribute.g.input, *attribute.g.output):
                    value.type.tensor_type.ClearField("shape")


def _check_versions(nodes: Sequence[onnx.NodeProto], opset: int) -> None:
    """Refuse an operator that has changed since the last set that a trace can have."""
    for node in nodes:
        if not node.domain and opset > LAST_OPSET:
            known, wanted = (
                onnx.defs.get_schema(node.op_type, version, "").since_version
                for version in (LAST_OPSET, opset)
            )
            if known != wanted:
                raise ExportError(
                    f"operator {node.op_type} has changed in operator set {opset}; convert the model to "
                    f"{LAST_OPSET}"
                )
