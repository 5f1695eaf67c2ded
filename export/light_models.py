"""Models without the content of their large constants, of which only names, types and shapes matter.

What looks at the nodes of a model need not carry its weights: serializing them
takes seconds for a gigabyte, and fails beyond two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import onnx
from onnx import helper
from onnx.external_data_helper import uses_external_data

#: Largest constant that may say something about shapes.
MAX_ELEMENTS: Final = 1024


def large_constants(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield the constants of a graph that say nothing about shapes: large ones, and those in other files."""
    for tensor in graph.initializer:
        if math.prod(tensor.dims) > MAX_ELEMENTS or uses_external_data(tensor):
            yield tensor


def stub(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """Return a constant of the same name, type and shape whose content is nowhere."""
    empty = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    empty.data_location = onnx.TensorProto.EXTERNAL
    empty.external_data.add(key="location", value="set_aside")
    return empty


def without_large_constants(model: onnx.ModelProto, *, with_outputs: bool = False) -> onnx.ModelProto:
    """Return a copy in which large constants of the main graph are inputs.

    Outputs become further value_info unless they are asked for, so that shape
    inference may give them other sizes than the graph declares.
    """
    graph = model.graph
    large = {tensor.name: tensor for tensor in large_constants(graph)}
    inputs = [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in large.values()]
    given = {value.name for value in graph.input}
    light = helper.make_graph(
        graph.node,
        graph.name,
        [*graph.input, *(value for value in inputs if value.name not in given)],
        graph.output if with_outputs else [],
        [tensor for tensor in graph.initializer if tensor.name not in large],
        value_info=[*graph.value_info, *([] if with_outputs else graph.output)],
        sparse_initializer=graph.sparse_initializer,
    )
    result = helper.make_model(light, functions=model.functions, ir_version=model.ir_version)
    del result.opset_import[:]
    result.opset_import.extend(model.opset_import)
    return result
