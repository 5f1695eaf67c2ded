"""LinearAttention nodes of ONNX models: what they take, and what of it chunks can keep."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, Final

import onnx
import onnx.shape_inference
import torch
from onnx import TensorProto, helper
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from qinvert.errors import ExportError, reason
from qinvert.export.light_models import large_constants, stub, without_large_constants
from qinvert.export.reading import check_calls, check_model, check_texts, tensors, within
from qinvert.files import check_readable

#: Long name of ONNX's own domain, whose short name is empty.
STANDARD: Final = "ai.onnx"
#: Name of the operator, and the domains that have it.
OPERATOR: Final = "LinearAttention"
DOMAINS: Final = ("com.microsoft", "", STANDARD)
#: Update rules with a triangular inverse; the others have none.
GATED: Final = "gated_delta"
RULES: Final = ("delta", GATED)
#: Inputs in order.
INPUTS: Final = ("query", "key", "value", "past_state", "decay", "beta")
#: Attributes that are read, and their types.
ATTRIBUTES: Final = {
    "q_num_heads": onnx.AttributeProto.INT,
    "kv_num_heads": onnx.AttributeProto.INT,
    "state_window": onnx.AttributeProto.INT,
    "scale": onnx.AttributeProto.FLOAT,
    "update_rule": onnx.AttributeProto.STRING,
}
#: Largest last axis of an input: a trace runs on tensors of it.
MAX_WIDTH: Final = 2**18
#: Element types that a trace can have.
TYPES: Final[dict[int, torch.dtype]] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}
ELEMENTS: Final = {dtype: element for element, dtype in TYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAttention:
    """One node, with every size that its graph fixes."""

    #: The node itself.
    node: onnx.NodeProto
    #: Heads of queries, keys and values; the state has those of the values.
    query_heads: int
    key_heads: int
    value_heads: int
    #: Length of a query and key, and of a value.
    key_size: int
    value_size: int
    #: Factor of the outputs, or None for ``key_size ** -0.5``.
    scale: float | None
    #: Last axis of the decay (0 where the rule has none, and ignores it) and of beta.
    decay_width: int
    beta_width: int
    #: Element type of activations and of the state.
    element: torch.dtype
    state_element: torch.dtype

    @property
    def inputs(self) -> dict[str, str]:
        """Tensor of every input that counts, by the operator's name for it."""
        found = {name: given for name, given in zip(INPUTS, self.node.input, strict=False) if given}
        if not self.decay_width:
            found.pop("decay", None)
        return found

    @property
    def outputs(self) -> list[onnx.ValueInfoProto]:
        """Types of the outputs, batch and length open."""
        heads = max(self.query_heads, self.value_heads)
        shapes = [None, None, heads * self.value_size], self.state_shape
        elements = [ELEMENTS[self.element], ELEMENTS[self.state_element]]
        return [
            helper.make_tensor_value_info(name, element, shape)
            for name, element, shape in zip(self.node.output, elements, shapes, strict=False)
            if name
        ]

    @property
    def signature(self) -> tuple[Any, ...]:
        """All that a trace of the node depends on."""
        own = (getattr(self, entry.name) for entry in fields(self) if entry.name != "node")
        return *own, *self.inputs

    @property
    def state_shape(self) -> list[int | None]:
        """Shape of the state, batch open."""
        return [None, self.value_heads, self.key_size, self.value_size]

    @property
    def past_state(self) -> list[onnx.ValueInfoProto]:
        """Type of the state that comes in, if one does."""
        name = self.inputs.get("past_state")
        element = ELEMENTS[self.state_element]
        return [helper.make_tensor_value_info(name, element, self.state_shape)] if name else []

    def example(self, batch: int, length: int) -> dict[str, torch.Tensor]:
        """Zeros in the shapes of the inputs."""
        widths = {
            "query": self.query_heads * self.key_size,
            "key": self.key_heads * self.key_size,
            "value": self.value_heads * self.value_size,
            "decay": self.decay_width,
            "beta": self.beta_width,
        }
        state = (batch, self.value_heads, self.key_size, self.value_size)
        return {
            name: torch.zeros(state, dtype=self.state_element)
            if name == "past_state"
            else torch.zeros(batch, length, widths[name], dtype=self.element)
            for name in self.inputs
        }


def load(path: str | PathLike[str]) -> onnx.ModelProto:
    """Read a model with its weights, wherever they lie.

    Raises
    ------
    ExportError
        If it is not an ONNX model, or its weights are missing.
    InputError
        If it is missing, a device, or larger than a model can be.
    """
    check_readable(path)
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
        _add_lengths(model)
        load_external_data_for_model(model, os.path.dirname(os.path.realpath(path)))  # noqa: PTH120
    except Exception as error:  # protobuf, onnx and the file system raise unrelated types here
        raise ExportError(f"{os.fspath(path)} is not a complete ONNX model ({reason(error)})") from None
    check_texts(model, path)
    check_calls(model)
    _spell_alike(model)
    check_model(without_large_constants(model, with_outputs=True), path)
    return model


def _add_lengths(model: onnx.ModelProto) -> None:
    """Say how long external tensors are where the model does not: onnx would read all of the file.

    onnxruntime knows it from the shape and the type.
    """
    import onnx_ir

    for tensor in filter(uses_external_data, tensors(model)):
        known = any(entry.key == "length" for entry in tensor.external_data)
        if known or tensor.data_type not in map(int, onnx_ir.DataType) or min(tensor.dims, default=0) < 0:
            continue
        kind = onnx_ir.DataType(tensor.data_type)
        if kind not in (onnx_ir.DataType.UNDEFINED, onnx_ir.DataType.STRING):
            length = -(-math.prod(tensor.dims) * kind.bitwidth // 8)
            tensor.external_data.add(key="length", value=str(length))


def weight_files(path: str | PathLike[str]) -> set[str]:
    """Return the files that hold weights of a model, which is not read as a whole."""
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as error:  # as above
        raise ExportError(f"{os.fspath(path)} is not a complete ONNX model ({reason(error)})") from None
    folder = os.path.dirname(os.path.realpath(path))  # noqa: PTH120 - names as the model has them
    named = (
        entry.value for tensor in tensors(model) for entry in tensor.external_data if entry.key == "location"
    )
    return {os.path.realpath(f"{folder}/{name}") for name in named}


def _spell_alike(model: onnx.ModelProto) -> None:
    """Call the domain of ONNX by its empty name only: it has two, which a model may mix."""
    for holder in (model, *model.functions):
        versions = {entry.domain: entry.version for entry in holder.opset_import}
        if STANDARD in versions:
            versions.setdefault("", versions.pop(STANDARD))
            del holder.opset_import[:]
            holder.opset_import.extend(helper.make_opsetid(*entry) for entry in versions.items())
    for node in within([*model.graph.node, *(n for function in model.functions for n in function.node)]):
        if node.domain == STANDARD:
            node.domain = ""


def find_nodes(model: onnx.ModelProto) -> dict[str, LinearAttention]:
    """Return the nodes with a triangular inverse by their names, in order.

    Raises
    ------
    ExportError
        If there is no such node, two have the same name, or one has an option or
        a size that is not supported.
    """
    shapes = without_large_constants(model)
    found: dict[str, LinearAttention] = {}
    for node in model.graph.node:
        if not _is_wanted(node):
            continue
        name = node.name or next(iter(node.output), "")
        options = _options(node, name)
        if name in found:
            raise ExportError(f"two nodes are called {name!r}; rename one")
        found[name] = _read(node, name, options, _values(shapes))
        # Shape inference does not know these operators, so what follows one starts again here.
        _declare(shapes.graph, found[name].outputs)
    if not found:
        refuse_hidden(model)
        raise ExportError(
            f"the model's graph has no {OPERATOR} node with update_rule {' or '.join(RULES)}; "
            "qinvert.export_model writes Hugging Face models themselves"
        )
    return found


def known_values(model: onnx.ModelProto, nodes: Iterable[LinearAttention]) -> list[onnx.ValueInfoProto]:
    """Types of all values of the main graph that follow from its inputs and from these nodes."""
    shapes = without_large_constants(model)
    for node in nodes:
        _declare(shapes.graph, [*node.outputs, *node.past_state])
    return list(_inferred(shapes).value_info)


def refuse_hidden(model: onnx.ModelProto) -> None:
    """Refuse a model with further nodes in the branches of an If, in loops or in local functions.

    Raises
    ------
    ExportError
        With the first of them.
    """
    waiting = [(f"function {f.name!r}", list(f.node)) for f in model.functions] + _bodies(model.graph.node)
    while waiting:
        place, nodes = waiting.pop()
        for node in nodes:
            if _is_wanted(node):
                raise ExportError(
                    f"node {node.name or node.output[0]!r} lies in {place}, where graft does not reach; move "
                    "it into the main graph, or name the nodes that are meant (layers=, --layer)"
                )
        waiting += _bodies(nodes)


def _bodies(nodes: Iterable[onnx.NodeProto]) -> list[tuple[str, list[onnx.NodeProto]]]:
    """Nodes of every graph that these nodes hold, with where it is."""
    return [
        (f"{attribute.name} of {node.op_type} {node.name!r}", list(graph.node))
        for node in nodes
        for attribute in node.attribute
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else []))
    ]


def _is_wanted(node: onnx.NodeProto) -> bool:
    """Whether a node is a LinearAttention with a triangular inverse."""
    rules = [a.s for a in node.attribute if a.name == "update_rule"] or [GATED.encode()]
    ours = node.op_type == OPERATOR and node.domain in DOMAINS
    return ours and rules[0] in [rule.encode() for rule in RULES]


def _options(node: onnx.NodeProto, name: str) -> dict[str, Any]:
    """Attributes of a node, checked: onnx knows the operator of its own domain only."""
    options = {}
    for attribute in node.attribute:
        wanted = ATTRIBUTES.get(attribute.name, attribute.type)
        if attribute.type != wanted:
            kind = onnx.AttributeProto.AttributeType.Name(wanted)
            raise ExportError(f"node {name!r}: attribute {attribute.name} must be {kind}; export it again")
        options[attribute.name] = helper.get_attribute_value(attribute)
    if not math.isfinite(options.get("scale", 0.0)):
        raise ExportError(f"node {name!r}: scale {options['scale']} is not finite; export it again")
    return options


def _read(
    node: onnx.NodeProto, name: str, options: Mapping[str, Any], values: Mapping[str, onnx.TypeProto.Tensor]
) -> LinearAttention:
    if options.get("state_window", 0):
        raise ExportError(f"node {name!r} keeps a window of states; chunks keep the last one only")
    inputs = {key: given for key, given in zip(INPUTS, node.input, strict=False) if given}
    gated = options.get("update_rule", GATED.encode()).decode() == GATED
    if not gated:
        inputs.pop("decay", None)
    for needed in ("query", "key", "value", "beta", *(("decay",) if gated else ())):
        if needed not in inputs:
            raise ExportError(f"node {name!r} has no input {needed}, which its update rule needs")
    # The sizes of the state follow from those of the others, so that its own need not be known.
    width = {
        key: _width(values.get(given), f"{key} of node {name!r}")
        for key, given in inputs.items()
        if key != "past_state"
    }
    queries, heads = options.get("q_num_heads", 0), options.get("kv_num_heads", 0)
    size = width["query"] // max(1, queries)
    legal = min(queries, heads, size) > 0 and width["query"] == queries * size
    legal = legal and max(width.values()) <= MAX_WIDTH
    legal = legal and width["key"] % size == 0 and width["value"] % heads == 0
    keys = width["key"] // max(1, size)
    legal = legal and keys > 0 and max(queries, heads) % min(queries, heads) == 0 and heads % keys == 0
    legal = legal and width["beta"] in (1, heads) and width.get("decay", heads) in (heads, heads * size)
    if not legal:
        raise ExportError(
            f"node {name!r} has {queries} and {heads} heads and widths {width}, which do not fit"
        )
    return LinearAttention(
        node=node,
        query_heads=queries,
        key_heads=keys,
        value_heads=heads,
        key_size=size,
        value_size=width["value"] // heads,
        scale=options.get("scale", 0.0) or None,
        decay_width=width.get("decay", 0),
        beta_width=width["beta"],
        element=_element(values, inputs["query"], name),
        state_element=_element(values, inputs.get("past_state", inputs["query"]), name),
    )


def set_aside(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Take the large constants out of a model, leave their names, types and shapes, and return them.

    What changes the nodes serializes the whole model each time, which takes
    seconds for a gigabyte, and fails beyond two.
    """
    found: dict[str, onnx.TensorProto] = {}
    for tensor in large_constants(model.graph):
        # One at a time: there is never more than one tensor twice.
        found[tensor.name] = onnx.TensorProto()
        found[tensor.name].CopyFrom(tensor)
        tensor.CopyFrom(stub(tensor))
    return found


def _declare(graph: onnx.GraphProto, values: Sequence[onnx.ValueInfoProto]) -> None:
    names = {value.name for value in values}
    kept = [value for value in graph.value_info if value.name not in names]
    del graph.value_info[:]
    graph.value_info.extend([*kept, *values])


def _values(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    graph = _inferred(model)
    found = {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info)}
    for tensor in graph.initializer:
        found[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type
    return found


def _inferred(model: onnx.ModelProto) -> onnx.GraphProto:
    try:
        return onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # the model may be wrong anywhere; the declared shapes may be enough
        return model.graph


def _width(value: onnx.TypeProto.Tensor | None, what: str) -> int:
    size: int = value.shape.dim[-1].dim_value if value is not None and value.shape.dim else 0
    if not size:
        raise ExportError(
            f"{what} has no known size of its last axis; declare it as value_info, for example by "
            "onnxruntime's symbolic shape inference"
        )
    return size


def _element(values: Mapping[str, onnx.TypeProto.Tensor], name: str, node: str) -> torch.dtype:
    element = int(values[name].elem_type) if name in values else 0
    if element and element not in TYPES:
        legal = ", ".join(TensorProto.DataType.Name(kind) for kind in TYPES)
        raise ExportError(f"node {node!r} reads {name!r} of element type {element}; {legal} can be traced")
    return TYPES.get(element, torch.float32)
