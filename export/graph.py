"""Builds an ONNX graph node by node, with names that read in Netron."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from qinvert.errors import ExportError
from qinvert.export.open_shapes import check_content

#: Sizes of a tensor; a name stands for a size that the caller chooses.
Sizes: TypeAlias = list[int | str]

#: IR version that every runtime of the last two years reads.
IR_VERSION = 9
#: The first IR version that has local functions.
LOCAL_FUNCTION_IR_VERSION = 8
#: The first IR version whose functions declare the types of their tensors.
FUNCTION_IR_VERSION = 10
#: Domain of the functions.
DOMAIN = "qinvert"

#: Protobuf files end at 2 GiB; constants stay well below.
MAX_BYTES = 2**30

#: ONNX element type by NumPy name.
ELEMENT_TYPES: Mapping[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int16": TensorProto.INT16,
    "uint16": TensorProto.UINT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}


class GraphBuilder:
    """Append-only ONNX graph; every tensor has a shape and an element type.

    Names are unique: a second tensor of the same name is an error of the
    caller.  Initializers of equal name must have equal content.
    """

    def __init__(self) -> None:
        self._bytes = 0
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._values: dict[str, onnx.ValueInfoProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def shape(self, name: str) -> Sizes:
        """Shape of an input, or of a tensor that a node writes."""
        return [d.dim_param or d.dim_value for d in self._value(name).type.tensor_type.shape.dim]

    def element(self, name: str) -> str:
        """NumPy name of the type of an input, or of a tensor that a node writes."""
        kind = self._value(name).type.tensor_type.elem_type
        return next(element for element, number in ELEMENT_TYPES.items() if number == kind)

    def _value(self, name: str) -> onnx.ValueInfoProto:
        return self._values.get(name) or next(value for value in self._inputs if value.name == name)

    def source(self, name: str) -> str:
        """First operand of the node that writes a tensor."""
        found: str = next(node.input[0] for node in reversed(self._nodes) if node.output[0] == name)
        return found

    def input(self, name: str, shape: Sequence[int | str], element: str = "float32") -> str:
        """Declare an input."""
        self._inputs.append(helper.make_tensor_value_info(name, ELEMENT_TYPES[element], shape))
        return name

    def output(self, name: str) -> str:
        """Declare that a tensor is an output; a node must have written it."""
        self._outputs.append(self._values.pop(name))
        return name

    def initializer(self, name: str, array: npt.NDArray[Any]) -> str:
        """Add a constant, or return the one of that name."""
        if name not in self._initializers:
            self._bytes += array.nbytes
        if self._bytes > MAX_BYTES:
            raise ExportError(
                f"the constants of the graph exceed {MAX_BYTES >> 20} MiB; export a smaller batch"
            )
        tensor = numpy_helper.from_array(np.asarray(array, order="C"), name)
        if self._initializers.setdefault(name, tensor) != tensor:
            raise ExportError(f"two different constants are called {name!r}; rename one in the program")
        return name

    def scalar(self, name: str, value: float) -> str:
        """Add a float32 scalar."""
        return self.initializer(name, np.array(value, dtype=np.float32))

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        output: str,
        shape: Sequence[int | str],
        element: str = "float32",
        **attributes: Any,
    ) -> str:
        """Append a node with one output and return the output's name; the node has the same name."""
        if output in self._values:
            raise ExportError(f"two nodes write {output!r}; rename a step of the program")
        self._nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        self._values[output] = helper.make_tensor_value_info(output, ELEMENT_TYPES[element], shape)
        return output

    def call(
        self,
        function: onnx.FunctionProto,
        inputs: Sequence[str],
        name: str,
        outputs: Mapping[str, tuple[Sizes, str]],
    ) -> None:
        """Append the call of a function, with the shape and element of every output."""
        self._nodes.append(
            helper.make_node(function.name, list(inputs), list(outputs), name=name, domain=function.domain)
        )
        for output, (shape, element) in outputs.items():
            self._values[output] = helper.make_tensor_value_info(output, ELEMENT_TYPES[element], shape)

    def inline(self, other: GraphBuilder, prefix: str, inputs: Mapping[str, str]) -> None:
        """Append the nodes of another graph; their tensors get a prefix, equal constants are shared.

        ``inputs`` says which tensor of this graph each input of the other one is.
        """
        names = dict(inputs)
        for name, tensor in other._initializers.items():
            same = self._initializers.get(name, tensor) == tensor
            names[name] = self.initializer(name if same else prefix + name, numpy_helper.to_array(tensor))
        for node in other._nodes:
            copy = onnx.NodeProto.FromString(node.SerializeToString())
            copy.input[:] = [names[name] for name in node.input]
            copy.name = copy.output[0] = names.setdefault(node.output[0], prefix + node.output[0])
            value = onnx.ValueInfoProto.FromString(other._values[node.output[0]].SerializeToString())
            value.name = copy.name
            if copy.name in self._values:
                raise ExportError(f"two nodes write {copy.name!r}; rename a step of the program")
            self._nodes.append(copy)
            self._values[copy.name] = value

    def model(
        self,
        name: str,
        opset: int,
        metadata: Mapping[str, str],
        doc: str,
        functions: Sequence[onnx.FunctionProto] = (),
        ir_version: int | None = None,
    ) -> onnx.ModelProto:
        """Return the finished model, checked by onnx with strict shape inference.

        Raises
        ------
        ExportError
            If onnx finds the graph illegal.
        """
        nodes = self._live_nodes()
        read = {tensor for node in nodes for tensor in node.input}
        graph = helper.make_graph(
            nodes,
            name,
            self._inputs,
            self._outputs,
            [tensor for name, tensor in self._initializers.items() if name in read],
            doc_string=doc,
            value_info=[value for name, value in self._values.items() if name in read],
        )
        domains = [helper.make_opsetid(DOMAIN, 1)] if functions else []
        model = helper.make_model(
            graph,
            functions=functions,
            opset_imports=[helper.make_opsetid("", opset), *domains],
            ir_version=ir_version or (FUNCTION_IR_VERSION if functions else IR_VERSION),
            producer_name="qinvert",
        )
        helper.set_model_props(model, dict(metadata))
        check(model)
        return model

    def function(self, name: str, opset: int, metadata: Mapping[str, str], doc: str) -> onnx.FunctionProto:
        """Return what was built as a function of the domain ``qinvert``.

        A function has no initializers: every constant is a Constant node with
        the name that it has in a graph, so that a call needs its tensors only
        and an inlined graph holds everything that compilers read as constant.
        """
        nodes = self._live_nodes()
        read = {tensor for node in nodes for tensor in node.input}
        constants = [
            helper.make_node("Constant", [], [name], name=name, value=tensor)
            for name, tensor in self._initializers.items()
            if name in read
        ]
        function = helper.make_function(
            DOMAIN,
            name,
            [value.name for value in self._inputs],
            [value.name for value in self._outputs],
            [*constants, *nodes],
            [helper.make_opsetid("", opset)],
            doc_string=doc,
            value_info=[value for name, value in self._values.items() if name in read],
        )
        for key, value in metadata.items():
            function.metadata_props.add(key=key, value=value)
        return function

    def _live_nodes(self) -> list[onnx.NodeProto]:
        """Nodes that an output depends on; runtimes would also compute the others."""
        wanted = {output.name for output in self._outputs}
        live = []
        for node in reversed(self._nodes):
            if wanted & set(node.output):
                live.append(node)
                wanted.update(node.input)
        return live[::-1]


def check(model: onnx.ModelProto) -> None:
    """Check a model by onnx, with strict shape inference.

    Raises
    ------
    ExportError
        If onnx finds it illegal.
    """
    try:
        check_content(model, full=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx refuses the exported graph: {error}") from error
