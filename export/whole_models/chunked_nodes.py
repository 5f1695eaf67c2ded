"""LinearAttention nodes as functions of chunks: nodes that are alike are traced once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Final

import onnx
import torch
from onnx import helper

from qinvert.calibration.head_names import entries_of, is_split
from qinvert.delta_rule.chunks import ChunkInverse
from qinvert.delta_rule.rule import chunk_gated_delta_rule
from qinvert.errors import ExportError
from qinvert.export.functions import function_names
from qinvert.export.graph import DOMAIN
from qinvert.export.whole_models.export_model import BATCH, EXAMPLE_CHUNKS, SEQUENCE, chunk_of
from qinvert.export.whole_models.linear_attention_nodes import LinearAttention
from qinvert.export.whole_models.tracing import calls_of, require_onnx_ir, trace
from qinvert.plan.plan import Plan

#: Last operator set that PyTorch's exporter converts to by itself.
LAST_OPSET: Final = 25
#: Sequences that a node is traced with.
SEQUENCES: Final = 2


class ChunkedNodes:
    """Functions that take the places of nodes, each with the calls of its layer.

    A trace takes seconds, and the nodes of a model differ in their layers only, so
    that one with other calls is the trace of the next.
    """

    def __init__(self, plan: Plan, taken: Collection[str], opset: int) -> None:
        self._plan = plan
        self._opset = opset
        self._taken = taken
        self._names = function_names(list(plan.layers), taken)
        #: Traces by what they depend on, and the names that each calls.
        self._traces: dict[Any, tuple[onnx.GraphProto, list[str]]] = {}

    def function(self, node: LinearAttention, layer: str, name: str) -> onnx.FunctionProto:
        """Return the chunks of a node, which call the inverse of a layer, under a name.

        Raises
        ------
        ExportError
            If the node cannot be traced, or an operator has changed since the last
            set that a trace can have.
        """
        entries = entries_of(self._plan, layer)
        factored = tuple(self._plan.layer(entry).program.inverse_ports.factored for entry in entries)
        calls = [self._names[entry] for entry in entries]
        # One head by itself is called with other shapes than a layer of one head.
        key = node.signature, is_split(self._plan, layer), factored
        if key not in self._traces:
            self._traces[key] = self._trace(node, layer), calls
        traced, before = self._traces[key]
        graph = onnx.GraphProto()
        graph.CopyFrom(traced)
        _rename_calls(graph, dict(zip(before, calls, strict=True)))
        return _function(graph, name, self._opset)

    def _trace(self, node: LinearAttention, layer: str) -> onnx.GraphProto:
        chunked = ChunkedNode(node, chunk_of(self._plan), partial(calls_of(self._plan, self._taken), layer))
        example = node.example(SEQUENCES, EXAMPLE_CHUNKS * chunked.chunk)
        axes = {0: torch.export.Dim(BATCH), 1: torch.export.Dim(SEQUENCE)}
        shapes = {name: {0: axes[0]} if name == "past_state" else axes for name in example}
        traced = trace(chunked.eval(), example, min(self._opset, LAST_OPSET), dynamic_shapes=shapes)
        graph: onnx.GraphProto = require_onnx_ir().serde.serialize_model(traced).graph
        _forget_shapes(graph)
        return graph


def _rename_calls(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        if node.domain == DOMAIN:
            node.op_type = names[node.op_type]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename_calls(attribute.g, names)


def _function(graph: onnx.GraphProto, name: str, opset: int) -> onnx.FunctionProto:
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in graph.initializer
    ]
    nodes = [*constants, *graph.node]
    _check_versions(nodes, opset)
    return helper.make_function(
        DOMAIN,
        name,
        [value.name for value in graph.input],
        [value.name for value in graph.output],
        nodes,
        [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)],
    )


class ChunkedNode(torch.nn.Module):
    """A LinearAttention node as our chunked delta rule; inputs and outputs are the node's."""

    def __init__(self, node: LinearAttention, chunk: int, inverse: ChunkInverse) -> None:
        super().__init__()
        self.node = node
        self.chunk = chunk
        self.inverse = inverse

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
        # As the kernel of onnxruntime: a scaled query may leave float16, and its result may not.
        query = query.to(torch.float32)
        q, k = _by_head(query, node.query_heads), _by_head(key, node.key_heads).to(torch.float32)
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
        return out.flatten(2).to(node.element), state[:, ::shared].to(node.state_element)


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.reshape(*x.shape[:-1], heads, -1)


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
