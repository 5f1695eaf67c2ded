"""The products of a graph with constant matrices: projections, MLPs and the head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qinvert.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir
    import torch

#: Key under which a node that stays in float is marked, in memory alone.
FLOAT: Final = "qinvert.float"
#: What a gate or a router reaches its product through ends at one of these.
PRODUCTS: Final = ("MatMul", "Gemm", "Conv")


def mark_floats(roots: Iterable[onnx_ir.Value]) -> None:
    """Mark the products that gates and routers come from, so that `products` leaves them out.

    From each root on, nodes are followed up to the first product with weights, and further where
    its input is itself a product, as in projections of low rank.
    """
    waiting, seen = [root.producer() for root in roots], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        before = [value.producer() for value in node.inputs if value is not None]
        if node.op_type in PRODUCTS and any(_is_constant(value) for value in node.inputs):
            node.meta[FLOAT] = True
            before = [other for other in before if other is not None and other.op_type in PRODUCTS]
        waiting += before


def mark_others(model: onnx_ir.Model, known: torch.nn.Module) -> None:
    """Mark the products with matrices of no linear layer of a model, such as those that mix streams."""
    import torch

    layers = (x.weight.detach().cpu().numpy() for x in known.modules() if isinstance(x, torch.nn.Linear))
    rows = {(weight.shape, weight[0].tobytes()) for weight in layers}
    for node in model.graph:
        matrix = _matrix(node.inputs[1]) if node.op_type == "MatMul" else None
        if matrix is not None and (matrix.shape, matrix[0].tobytes()) not in rows:
            node.meta[FLOAT] = True


def _matrix(value: onnx_ir.Value | None) -> Any:
    """A constant as a linear layer stores it, ``[N, K]``; None for what is computed."""
    stored = _stored(value)
    if value is None or stored is None or len(stored.shape) != 2:
        return None
    matrix = stored.numpy()
    return matrix if value.const_value is None else matrix.T


def _stored(value: onnx_ir.Value | None) -> onnx_ir.TensorProtocol | None:
    """The constant that a value is, or that it is the transpose of."""
    node = None if value is None else value.producer()
    if value is not None and value.const_value is None and node is not None and node.op_type == "Transpose":
        value = node.inputs[0]
    return None if value is None else value.const_value


def _is_constant(value: onnx_ir.Value | None) -> bool:
    return _stored(value) is not None


def fold_transposes(model: onnx_ir.Model, *, shared: bool) -> None:
    """Store matrices as products read them, in place of a Transpose of each in the graph.

    PyTorch's exporter does so for small ones only.

    Parameters
    ----------
    model : onnx_ir.Model
    shared : bool
        Whether a matrix that others read, too, is stored a second time, as a tied head's.
    """
    for node in list(model.graph):
        value = node.inputs[0] if node.op_type == "Transpose" else None
        if value is None or value.const_value is None or value.name not in model.graph.initializers:
            continue
        if value.shape is not None and len(value.shape) == 2 and (shared or len(value.uses()) == 1):
            _fold(model, node, value)


def _fold(model: onnx_ir.Model, node: onnx_ir.Node, value: onnx_ir.Value) -> None:
    import onnx_ir

    given, before = value.const_value, node.outputs[0]
    assert given is not None
    # Read when it is written: a model is not in memory twice.
    folded = onnx_ir.LazyTensor(
        lambda: onnx_ir.Tensor(given.numpy().T.copy()),
        dtype=given.dtype,
        shape=onnx_ir.Shape([*reversed(given.numpy().shape)]),
        name=f"{value.name}.transposed",
    )
    after = onnx_ir.Value(
        name=folded.name, shape=folded.shape, type=onnx_ir.TensorType(given.dtype), const_value=folded
    )
    model.graph.initializers[str(after.name)] = after
    onnx_ir.convenience.replace_all_uses_with(before, after)
    model.graph.remove(node, safe=True)


def products(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    """Return the products with a constant matrix, in the order of the graph, but for the marked ones.

    Nodes of planned layers are not among them: their constants are integers.
    """
    import onnx_ir

    return [
        node
        for node in model.graph
        if node.op_type == "MatMul"
        and FLOAT not in node.meta
        and (weight := node.inputs[1]) is not None
        and weight.name in model.graph.initializers
        and weight.dtype == onnx_ir.DataType.FLOAT
        and weight.shape is not None
        and len(weight.shape) == 2
    ]


def tensors(nodes: Sequence[onnx_ir.Node]) -> list[str]:
    """Names of the activations around products, input and output of each, in their order."""
    return [str(value.name) for node in nodes for value in (node.inputs[0], node.outputs[0]) if value]


def same_products(prefill: onnx_ir.Model, decode: onnx_ir.Model) -> dict[str, str]:
    """Return the tensor of the prefill graph for each tensor around a product of the decode graph.

    Raises
    ------
    ExportError
        If the graphs do not have the same products in the same order.
    """
    first, second = products(prefill), products(decode)
    alike = len(first) == len(second) and all(map(_same_weight, first, second))
    if not alike:
        raise ExportError(
            "prefill and decode multiply by other weights, so that they cannot share the grids of their "
            "activations; deploy with --weights none"
        )
    return dict(zip(tensors(second), tensors(first), strict=True))


def _same_weight(one: onnx_ir.Node, other: onnx_ir.Node) -> bool:
    first, second = (_weight(node) for node in (one, other))
    return np.array_equal(first, second)


def _weight(node: onnx_ir.Node) -> Any:
    value = node.inputs[1]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()
