"""Forms of PyTorch's operators that compilers of NPUs take: sums and products in place of selections."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from qinvert.errors import ExportError
from qinvert.export.whole_models.tracing import require_onnx_ir

if TYPE_CHECKING:
    import onnx_ir

#: What stands for minus infinity where a mask is a factor: 0 times infinity is no number.
LOWEST: Final = float(np.finfo(np.float32).min)
#: Above it, ``log(1 + exp(x))`` is x in float32.
SOFTPLUS_IS_LINEAR: Final = 20.0


def translations() -> dict[Any, Callable[..., Any]]:
    """Return what PyTorch's exporter writes for an operator, by the operator."""
    require_onnx_ir()
    aten = torch.ops.aten
    return {
        aten.softplus.default: _softplus,
        aten.slice_scatter.default: _slice_scatter,
        aten.scatter.value: _scatter_value,
        aten.masked_fill.Scalar: _masked_fill,
    }


def _operators() -> Any:
    from onnxscript import opset18

    return opset18


def _softplus(x: Any, beta: float = 1.0, threshold: float = SOFTPLUS_IS_LINEAR) -> Any:
    """``log(1 + exp(x))``; PyTorch's own form selects x above 20, to which it is equal in float32."""
    if beta != 1.0 or threshold < SOFTPLUS_IS_LINEAR:
        raise ExportError(
            f"softplus of beta {beta:g} and threshold {threshold:g} has no ONNX operator; deploy knows "
            "1 and 20"
        )
    return _operators().Softplus(x)


def _slice_scatter(
    x: Any, source: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    """Put a tensor in the place of a slice: what is before it, the tensor, what is behind it."""
    size = int(x.shape[dim])
    first, last, stride = slice(start, end).indices(size)
    if step != stride:
        raise ExportError("the model writes every n-th element of a tensor, which deploy cannot express")
    axis, parts = dim % len(x.shape), [source]
    if first > 0:
        parts.insert(0, _slice(x, 0, first, axis))
    if last < size:
        parts.append(_slice(x, last, size, axis))
    return parts[0] if len(parts) == 1 else _operators().Concat(*parts, axis=axis)


def _slice(x: Any, first: int, last: int, axis: int) -> Any:
    bounds = (_integers(first), _integers(last), _integers(axis))
    return _operators().Slice(x, *bounds)


def _integers(*values: int) -> Any:
    return _operators().Constant(value_ints=list(values))


def _scatter_value(x: Any, dim: int, index: Any, value: float) -> Any:
    """Write one value at the places that an index of the last axis names: ``x (1 - m) + m value``.

    ``m[.., j] = max_i (index[.., i] == j)``, which is 0 or 1.
    """
    if dim % len(x.shape) != len(x.shape) - 1:
        raise ExportError(
            "the model scatters along another axis than the last one, which deploy cannot express"
        )
    op = _operators()
    places = op.Constant(value_ints=list(range(int(x.shape[dim]))))
    same = op.Equal(op.Unsqueeze(index, _integers(-1)), places)
    mask = op.ReduceMax(op.Cast(same, to=1), _integers(-2), keepdims=0)
    return _blended(x, mask, float(value))


def _masked_fill(x: Any, mask: Any, value: float) -> Any:
    """Put a value where a mask is true: ``x (1 - m) + m value``; minus infinity becomes `LOWEST`."""
    return _blended(x, _operators().Cast(mask, to=1), max(float(value), LOWEST))


def _blended(x: Any, mask: Any, value: float) -> Any:
    op = _operators()
    one, filler = (op.Constant(value_float=number) for number in (1.0, value))
    return op.Add(op.Mul(x, op.Sub(one, mask)), op.Mul(mask, filler))


def write_squares(model: onnx_ir.Model) -> None:
    """Write ``x^2`` as ``x x``, the same number.

    Qualcomm's compiler (onnxruntime-qnn 2.7.0, v73 and v81) knows a root-mean-square norm by its Pow,
    and then fails with ``QNN_COMMON_ERROR_MEM_ALLOC`` where the norm has a weight.  It takes the same
    norm with products.
    """
    import onnx_ir

    for node in list(model.graph):
        if node.op_type != "Pow" or _number(node.inputs[1]) != 2.0:
            continue
        x, before = node.inputs[0], node.outputs[0]
        product = onnx_ir.Node("", "Mul", [x, x], num_outputs=1, name=node.name)
        after = product.outputs[0]
        after.name, after.shape, after.type = before.name, before.shape, before.type
        model.graph.insert_after(node, product)
        onnx_ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def drop_empty_parts(model: onnx_ir.Model) -> None:
    """Leave out empty parts of a tensor that is split, such as the rotated part of keys without rotation."""
    import onnx_ir

    for node in list(model.graph):
        if node.op_type != "Split" or not any(_is_empty(part) for part in node.outputs):
            continue
        left, given = [part for part in node.outputs if not _is_empty(part)], node.inputs[0]
        if (
            given is not None
            and len(left) == 1
            and not any(part.uses() for part in node.outputs if part is not left[0])
        ):
            onnx_ir.convenience.replace_all_uses_with(left[0], given)
            model.graph.remove(node, safe=True)


def _is_empty(value: onnx_ir.Value) -> bool:
    return value.shape is not None and 0 in value.shape


def join_softplus(model: onnx_ir.Model) -> None:
    """Write ``where(x > 20, x, log(1 + exp(x)))``, which some models spell out, as one Softplus."""
    import onnx_ir

    for node in list(model.graph):
        x = _spelled_softplus(node) if node.op_type == "Where" else None
        if x is None:
            continue
        joined = onnx_ir.Node("", "Softplus", [x], num_outputs=1)
        before, after = node.outputs[0], joined.outputs[0]
        after.name, after.shape, after.type = f"{before.name}/softplus", before.shape, before.type
        model.graph.insert_after(node, joined)
        onnx_ir.convenience.replace_all_uses_with(before, after)


def _spelled_softplus(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """The x of a Where that is a softplus; None for any other."""
    condition, x, other = node.inputs
    greater = _writer(condition, "Greater")
    logarithm = _writer(other, "Log")
    total = _writer(logarithm.inputs[0], "Add") if logarithm is not None else None
    if greater is None or total is None or greater.inputs[0] is not x:
        return None
    threshold = _number(greater.inputs[1])
    powers = [term for term in total.inputs if _writer(term, "Exp") is not None]
    ones = [term for term in total.inputs if _number(term) == 1.0]
    if threshold is None or threshold < SOFTPLUS_IS_LINEAR or len(powers) != 1 or len(ones) != 1:
        return None
    power = _writer(powers[0], "Exp")
    return x if power is not None and power.inputs[0] is x else None


def _writer(value: onnx_ir.Value | None, operator: str) -> onnx_ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == operator else None


def _number(value: onnx_ir.Value | None) -> float | None:
    constant = None if value is None else value.const_value
    return float(constant.numpy().item()) if constant is not None and constant.size == 1 else None
