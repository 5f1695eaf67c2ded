"""How far the outputs of a grafted model are from those of its host."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper

from qinvert.errors import InputError, MissingDependencyError, VerificationError, reason
from qinvert.export.runtimes.onnxruntime_cpu import open_session
from qinvert.export.whole_models.check import can_run
from qinvert.export.whole_models.linear_attention_nodes import LinearAttention, find_nodes, load
from qinvert.metrics import norm_share

#: Tokens of the inputs that are drawn: more than a chunk of 64, and no whole number of chunks.
TOKENS: Final = 80

Array = npt.NDArray[Any]


def compare_graft(
    source: str | PathLike[str],
    path: str | PathLike[str],
    inputs: Mapping[str, Array] | None = None,
) -> dict[str, float]:
    """``||y - x|| / ||x||`` of every output, x by the host and y by the grafted model, on onnxruntime.

    Both run on the same inputs.  What remains is the error of the plan's integers on these
    inputs, and float32 sums in another order.

    Parameters
    ----------
    source, path : path
        The host, and what `qinvert.graft` made of it.
    inputs : mapping of arrays, optional
        Inputs by their names.  If left out they are drawn: one sequence of `TOKENS` tokens,
        with ids that tables of the graph have, masks of 1, and keys of norm 1, decays below 0
        and beta below 1 where nodes take them from outside.

    Returns
    -------
    dict of float
        By the name of the output.

    Raises
    ------
    InputError
        If onnxruntime cannot run one of them on these inputs.
    VerificationError
        If an output has another shape or type than that of the host.
    MissingDependencyError
        If onnxruntime is not installed.
    """
    if not can_run():
        raise MissingDependencyError(
            "comparing needs onnxruntime, which is not installed; run: pip install onnxruntime"
        )
    given = dict(inputs) if inputs is not None else drawn(load(source))
    # One after the other, so that the weights are never in memory twice.
    wanted, found = _run(source, given), _run(path, given)
    for name, x in wanted.items():
        if found[name].shape != x.shape or found[name].dtype != x.dtype:
            raise VerificationError(
                f"output {name!r} is {found[name].dtype} {list(found[name].shape)} after graft, and was "
                f"{x.dtype} {list(x.shape)}; report this as a fault of graft"
            )
    return {
        name: norm_share(torch.from_numpy(found[name]), torch.from_numpy(x)) for name, x in wanted.items()
    }


def _run(path: str | PathLike[str], given: Mapping[str, Array]) -> dict[str, Array]:
    try:
        session = open_session(os.fspath(path))
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(given)), strict=True))
    except Exception as error:  # onnxruntime raises unrelated types here
        raise InputError(
            f"onnxruntime cannot run {os.fspath(path)} on inputs of {TOKENS} tokens: {reason(error)}; pass "
            "inputs that the model takes (compare_graft(..., inputs=))"
        ) from error


def drawn(model: onnx.ModelProto) -> dict[str, Array]:
    """Draw inputs for a host, the same on every call."""
    draw = np.random.default_rng(0)
    initial = {tensor.name for tensor in model.graph.initializer}
    nodes = find_nodes(model).values()
    roles = {name: (role, node) for node in nodes for role, name in node.inputs.items()}
    tables = _tables(model)
    found = {}
    for value in model.graph.input:
        if value.name in initial:
            continue
        role, node = roles.get(value.name, ("", None))
        shape = _shape(value, node if role == "past_state" else None)
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if dtype.kind in "iub":
            x = _integers(draw, value.name, shape, tables.get(value.name, 2))
        else:
            x = _reals(draw, shape, role, node)
        found[value.name] = x.astype(dtype)
    return found


def _shape(value: onnx.ValueInfoProto, state: LinearAttention | None) -> list[int]:
    """Sizes of an input: batches are 1, other open axes `TOKENS`; a state's are those of its node."""
    if state is not None:
        return [size or 1 for size in state.state_shape]
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value or (1 if axis == 0 else TOKENS) for axis, dim in enumerate(dims)]


def _tables(model: onnx.ModelProto) -> dict[str, int]:
    """Number of rows of the smallest table that an input looks up."""
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    found: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in rows:
            found[node.input[1]] = min(rows[node.input[0]], found.get(node.input[1], rows[node.input[0]]))
    return found


def _integers(draw: np.random.Generator, name: str, shape: list[int], rows: int) -> Array:
    if "mask" in name:
        return np.ones(shape, np.int64)
    if "position" in name:
        return np.broadcast_to(np.arange(shape[-1] if shape else 1), shape)
    return draw.integers(0, rows, shape)


def _reals(draw: np.random.Generator, shape: list[int], role: str, node: LinearAttention | None) -> Array:
    x: Array = draw.standard_normal(shape)
    if node is not None and role == "key":
        keys = x.reshape(*shape[:-1], -1, node.key_size)
        x = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
        return x.reshape(shape)
    if role == "decay":
        return -0.3 * np.abs(x)
    return 1 / (1 + np.exp(-x)) if role == "beta" else x
