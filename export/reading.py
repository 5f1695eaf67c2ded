"""Reads ONNX files that may come from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Final

import onnx
import onnx.inliner
from google.protobuf.message import Message
from onnx.external_data_helper import uses_external_data

from qinvert.errors import ExportError, reason
from qinvert.export.open_shapes import check_content

#: Most nodes of a graph whose functions are inlined.
MAX_NODES: Final = 2**20


def read_model(content: bytes, path: str | PathLike[str]) -> onnx.ModelProto:
    """Parse an ONNX file that is complete in itself.

    External data would name files of this machine, and control flow may not
    end: exported graphs have neither, so both are refused.

    Raises
    ------
    ExportError
        If it is not an ONNX model, or one with external data or subgraphs.
    """
    model = parse_model(content, path)
    check_model(model, path)
    if model.graph.sparse_initializer:
        raise ExportError(f"{path} has sparse constants, which exported graphs have not; export it again")
    for node in _nodes(model):
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise ExportError(f"{path}: node {node.name!r} ({node.op_type}) has a subgraph; export it again")
    for tensor in tensors(model):
        if uses_external_data(tensor):
            raise ExportError(f"{path}: tensor {tensor.name!r} lies in another file; export it again")
    return model


def parse_model(content: bytes, path: str | PathLike[str]) -> onnx.ModelProto:
    """Parse any ONNX file, legal or not.

    Raises
    ------
    ExportError
        If it is not an ONNX model.
    """
    try:
        return onnx.load_model_from_string(content)
    except Exception as error:  # protobuf and onnx raise unrelated types here
        raise _no_model(path, error) from None


def check_model(model: onnx.ModelProto, path: str | PathLike[str]) -> None:
    """Refuse a model that onnx finds illegal, or whose names are no text; ``path`` is for the message."""
    check_texts(model, path)
    try:
        check_content(model, full=False)
    except Exception as error:  # as above
        raise _no_model(path, error) from None


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a checked model without local functions: every call is replaced by the function's nodes.

    Raises
    ------
    ExportError
        If they call each other, or onnx cannot inline them.
    """
    if not model.functions:
        return model
    check_calls(model)
    try:
        return onnx.inliner.inline_local_functions(model)
    except Exception as error:  # as above
        raise ExportError(f"the model's functions cannot be inlined ({reason(error)})") from None


def check_texts(message: Message, path: str | PathLike[str]) -> None:
    """Refuse names and texts that are not UTF-8: protobuf reads them, and fails where they are used.

    Raises
    ------
    ExportError
        If there is one.
    """
    for text in _texts(message):
        if not isinstance(text, str):
            raise ExportError(f"{path}: the name {text[:40]!r} in it is not UTF-8 text; export it again")


def _texts(message: Message) -> Iterator[str | bytes]:
    """Yield every text of a message; what is not UTF-8 comes as bytes."""
    for field, value in message.ListFields():
        if isinstance(value, Message):
            yield from _texts(value)
        elif field.message_type is not None:
            for part in value:
                yield from _texts(part)
        elif field.type == field.TYPE_STRING:
            yield from [value] if isinstance(value, (str, bytes)) else value


def check_calls(model: onnx.ModelProto) -> None:
    """Refuse a model whose functions call each other, or that has too many nodes once they are inlined.

    Functions that call functions double at every level, so that a small file
    may be an endless graph for whoever inlines it or infers its shapes.

    Raises
    ------
    ExportError
        If a function calls itself, or with the number of nodes.
    """
    bodies = {(function.domain, function.name): function.node for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    for name in bodies:
        _measure(name, bodies, sizes)
    total = sum(sizes.get((node.domain, node.op_type), 1) for node in within(model.graph.node))
    if total > MAX_NODES:
        raise ExportError(
            f"the model has {total:.3g} nodes once it is inlined; at most {MAX_NODES:,} are read"
        )


def _measure(
    first: tuple[str, str],
    bodies: Mapping[tuple[str, str], Sequence[onnx.NodeProto]],
    sizes: dict[tuple[str, str], int],
) -> None:
    """Count the nodes of a function and of those that it calls, without recursion."""
    waiting, open_ = [first], set[tuple[str, str]]()
    while waiting:
        name = waiting[-1]
        called = [(node.domain, node.op_type) for node in within(bodies[name])]
        unknown = [call for call in called if call in bodies and call not in sizes]
        if not unknown:
            sizes.setdefault(name, sum(sizes.get(call, 1) for call in called))
            open_.discard(waiting.pop())
            continue
        open_.add(name)
        if open_ & set(unknown):
            raise ExportError(f"function {name[1]!r} calls itself; no model can be made of it")
        waiting += dict.fromkeys(unknown)


def within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes, and those of every graph that they hold."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from within(graph.node)


def _no_model(path: str | PathLike[str], error: Exception) -> ExportError:
    return ExportError(f"{path} is not an ONNX model ({reason(error)}); export it again")


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every constant of a model, those of its nodes and functions included."""
    yield from model.graph.initializer
    yield from _parts(model.graph.sparse_initializer)
    for node in _nodes(model):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            yield from _parts((attribute.sparse_tensor, *attribute.sparse_tensors))


def _parts(sparse: Iterable[onnx.SparseTensorProto]) -> Iterator[onnx.TensorProto]:
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)
