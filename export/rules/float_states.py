"""A state that goes from chunk to chunk in float32: which tensors of a graph hold it."""

from __future__ import annotations

from typing import Final

import onnx

from qinvert.chunk_step.ports import STATE
from qinvert.export.rules.graph_index import Structure

#: Operators that decay such a state, add to it, or move it.
OPERATORS: Final = frozenset({"Add", "Concat", "Mul", "Reshape", "Slice", "Sub", "Transpose"})


def carried_floats(graph: Structure) -> set[str]:
    """Tensors between the state that a graph takes and the states that it returns, where nothing is rounded.

    None if the state is rounded in between, as everywhere else.
    """
    return graph.memo("carried_floats", _find)


def _find(graph: Structure) -> set[str]:
    return _taken(graph) & _returned(graph)


def _taken(graph: Structure) -> set[str]:
    found = {STATE} & graph.inputs
    for node in graph.nodes:
        if node.op_type in OPERATORS and found.intersection(node.input):
            found.update(node.output)
    return found


def _returned(graph: Structure) -> set[str]:
    found = {name for name in graph.outputs if name.startswith(STATE)}
    for node in reversed(graph.nodes):
        if node.op_type in OPERATORS and found.intersection(node.output):
            found.update(name for name in node.input if _is_tensor(graph, name))
    return found


def _is_tensor(graph: Structure, name: str) -> bool:
    node: onnx.NodeProto | None = graph.writers.get(name)
    return name in graph.inputs or (node is not None and node.op_type in OPERATORS)
