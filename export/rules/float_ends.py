"""The float ends of a quantized graph: what makes M of the inputs, and T of the result."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from qinvert.export.interface import KEYS, LOG_DECAY
from qinvert.export.rules.graph_index import Structure
from qinvert.program.ports import BETA

#: Operators that prepare the float inputs of keys element by element, or transpose them.
ELEMENTWISE: Final = ("Transpose", "Mul", "Exp")


def is_float_end(graph: Structure, node: onnx.NodeProto) -> bool:
    """Whether a node makes M of the inputs, or ``T = I + S`` or ``I + beta W`` of the result."""
    if _is_preparation(graph, node):
        return True
    others = [name for name in node.input if graph.constant(name) is None]
    if node.op_type == "Mul":
        readers = [reader for name in node.output for reader in graph.readers[name]]
        return _is_scaled_result(graph, node) and all(_is_final(graph, reader) for reader in readers)
    sources = [graph.writers.get(name) for name in others]
    return _is_final(graph, node) and all(
        source is not None and (source.op_type == "DequantizeLinear" or _is_scaled_result(graph, source))
        for source in sources
    )


def is_from_keys(graph: Structure, node: onnx.NodeProto) -> bool:
    """Whether a node computes on the inputs k, beta and g, before anything is quantized.

    Its products have a constant operand, or multiply the keys by themselves; a
    product of M is not one of them.
    """
    return set(node.output) <= graph.memo("from_keys", _find_from_keys)


def _find_from_keys(graph: Structure) -> set[str]:
    """Tensors that nodes make of the inputs k, beta and g."""
    found: set[str] = set()
    if not {KEYS, BETA, LOG_DECAY} <= _roles(graph):
        return found
    for node in graph.nodes:
        known = all(n in graph.inputs or n in found or graph.constant(n) is not None for n in node.input)
        if known and (node.op_type in ELEMENTWISE or _is_product_of_inputs(graph, node)):
            found.update(node.output)
    return found


def _is_product_of_inputs(graph: Structure, node: onnx.NodeProto) -> bool:
    if node.op_type != "MatMul":
        return False
    left, right = node.input
    turned = graph.writers.get(right)
    keys = left in graph.inputs and _role(left) == KEYS
    grams = keys and turned is not None and turned.op_type == "Transpose" and left in turned.input
    return grams or graph.constant(right) is not None


def _roles(graph: Structure) -> set[str]:
    return {_role(name) for name in graph.inputs}


def _role(name: str) -> str:
    # Graphs of several layers have an input LAYER/k for each.
    return name.rpartition("/")[2]


def _is_preparation(graph: Structure, node: onnx.NodeProto, depth: int = 2) -> bool:
    # The sign flip or the smallest beta, then the division or the transpose: the chain is not longer.
    if is_from_keys(graph, node):
        return True
    if node.op_type == "Mul":
        constants = [c for name in node.input if (c := graph.constant(name)) is not None]
        flips = any(c.size == 1 and c.reshape(()) == -1 for c in constants)
        return flips and bool(graph.inputs & set(node.input))
    if node.op_type not in ("Max", "Div", "Transpose") or BETA not in _roles(graph):
        return False
    return all(_is_prepared(graph, name, depth - 1) for name in node.input)


def _is_prepared(graph: Structure, name: str, depth: int = 2) -> bool:
    source = graph.writers.get(name)
    if name in graph.inputs or graph.constant(name) is not None:
        return True
    return depth > 0 and source is not None and _is_preparation(graph, source, depth)


def _is_scaled_result(graph: Structure, node: onnx.NodeProto) -> bool:
    kinds = sorted(
        "grid" if graph.operator(name) == "DequantizeLinear" else "beta" if _is_prepared(graph, name) else ""
        for name in node.input
    )
    return node.op_type == "Mul" and kinds == ["beta", "grid"]


def _is_final(graph: Structure, node: onnx.NodeProto) -> bool:
    constants = [c for name in node.input if (c := graph.constant(name)) is not None]
    ends = node.op_type == "Add" and set(node.output) <= graph.outputs
    return ends and any(_is_identity(c) for c in constants)


def _is_identity(array: npt.NDArray[Any]) -> bool:
    return array.ndim >= 2 and bool((array == np.eye(*array.shape[-2:])).all())
