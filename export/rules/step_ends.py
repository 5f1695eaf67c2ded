"""The ends of the graph of a chunk step: batch, heads and tokens as axes of their own, floats among them."""

from __future__ import annotations

import re
from typing import Final

import onnx

from qinvert.chunk_step.ports import INPUTS
from qinvert.export.rules.graph_index import Structure

#: Operators between the inputs and what is quantized: norms, valid tokens, value channels.
OPERATORS: Final = frozenset({"Reshape", "Mul", "MatMul", "ReduceSum", "Add", "Sqrt", "Div"})
#: Axis of heads in inputs and outputs, along which heads with plans of their own are cut and joined.
HEADS: Final = 1
#: What names of the tensors of such a head begin with.
HEAD: Final = "head_{}/"
#: Most axes of a tensor: compilers for NPUs refuse five.
MAX_RANK: Final = 4


def is_step_end(graph: Structure, node: onnx.NodeProto) -> bool:
    """Whether a node belongs to the ends, before anything is quantized or after everything is."""
    known = node.op_type in OPERATORS or moves_heads(node)
    return known and set(node.output) <= step_ends(graph)


def step_ends(graph: Structure) -> set[str]:
    """Tensors of the ends, inputs and outputs included; none if the graph is not one of a chunk step."""
    return graph.memo("step_ends", _find)


def _find(graph: Structure) -> set[str]:
    if not set(INPUTS) <= graph.inputs:
        return set()
    return _from_inputs(graph) | _to_outputs(graph)


def _from_inputs(graph: Structure) -> set[str]:
    found = set(graph.inputs)
    for node in graph.nodes:
        given = [name for name in node.input if graph.constant(name) is None]
        # A product of two inputs is one of the program.
        single = node.op_type != "MatMul" or len(given) == 1
        of_ends = node.op_type in OPERATORS and single and set(given) <= found
        if of_ends or _gets_axes(graph, node) or (node.op_type == "Slice" and moves_heads(node)):
            found.update(node.output)
    return found


def _gets_axes(graph: Structure, node: onnx.NodeProto) -> bool:
    """Whether a node dequantizes an input with axes that a Reshape then folds."""
    if node.op_type != "DequantizeLinear" or node.input[0] not in graph.inputs:
        return False
    shape = graph.shape(node.input[0]) or ()
    return len(shape) != MAX_RANK or shape[0] != 1


def moves_heads(node: onnx.NodeProto) -> bool:
    """Whether a node cuts one head off an input, or joins heads, each of which has scales of its own."""
    if node.op_type == "Slice":
        return re.fullmatch(HEAD.format(r"\d+") + re.escape(node.input[0]), node.output[0]) is not None
    heads = [HEAD.format(i) + node.output[0] for i in range(len(node.input))]
    return bool(node.op_type == "Concat" and list(node.input) == heads)


def _to_outputs(graph: Structure) -> set[str]:
    found = set(graph.outputs)
    for node in reversed(graph.nodes):
        given = [name for name in node.input if graph.constant(name) is None]
        moves = node.op_type in ("Reshape", "Mul", "MatMul") and len(given) == 1
        if set(node.output) <= found and (moves or moves_heads(node)):
            found.update(name for name in given if graph.operator(name) in ("Reshape", "Mul", "MatMul"))
    return found
