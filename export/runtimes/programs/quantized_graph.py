"""Reads a QDQ graph as what it means to integers; needs NumPy and onnx alone.

Compilers that take integers instead of floats between quantizations see three parts: float
operators before the first QuantizeLinear, operators on integers, and float operators behind them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.utils import Extractor

Array = npt.NDArray[Any]
#: What a graph's integers exceed the signed ones of the same width by.
OFFSETS = {
    "int8": ("int8", 0),
    "uint8": ("int8", 128),
    "int16": ("int16", 0),
    "uint16": ("int16", 32768),
}
#: The first operator set whose DequantizeLinear onnx evaluates; earlier ones define the same for 8 bits.
FIRST_OPSET = 19
#: Operators that move integers and do not change them.
MOVES = ("Concat", "Slice", "Transpose", "Reshape")
#: Operators that repeat an operand along axes of size 1.
BROADCASTS = ("Add", "Sub", "Mul")
#: Inputs that are tensors, where that is not all of them.
DATA_INPUTS = {"Slice": 1, "Reshape": 1, "Clip": 1}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tensor:
    """Integers ``q`` that stand for ``scale (q - zero_point)``.

    Unsigned ones are kept as signed: ``q - 128`` of uint8, with a zero point that is 128 smaller.
    """

    name: str
    shape: tuple[int, ...]
    #: NumPy name of the signed type.
    element: str
    scale: float
    zero_point: int = 0
    #: What the graph's own integers exceed these by.
    offset: int = 0
    #: Set for constants.
    values: Array | None = None

    @property
    def grid(self) -> tuple[str, float, int]:
        """Type, scale and zero point."""
        return self.element, self.scale, self.zero_point

    def signed(self, integers: Array) -> Array:
        """Return the graph's integers as these."""
        return (integers.astype(np.int32) - self.offset).astype(self.element)

    def unsigned(self, integers: Array) -> Array:
        """Return these integers as the graph's."""
        return (integers.astype(np.int32) + self.offset).astype(
            f"u{self.element}" if self.offset else self.element
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Operator:
    """One operator on integers: its name in ONNX, or ``QuantizeLinear`` from grid to grid."""

    kind: str
    name: str
    inputs: tuple[Tensor, ...]
    output: Tensor
    #: Attributes of the node, and its constant inputs by their names in ONNX.
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedGraph:
    """The three parts of a QDQ graph."""

    #: Float operators from the graph's inputs to the integers of `inputs`.
    before: onnx.ModelProto
    inputs: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    outputs: tuple[Tensor, ...]
    #: Float operators from the integers of `outputs`, and the graph's inputs, to its outputs.
    after: onnx.ModelProto

    def quantized(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Return the integers of `inputs`, by ONNX's definition of QuantizeLinear."""
        found = evaluated(self.before, feed)
        return {tensor.name: tensor.signed(found[tensor.name]) for tensor in self.inputs}

    def returned(self, feed: Mapping[str, Array], results: Mapping[str, Array]) -> list[Array]:
        """Return the graph's outputs for the integers of `outputs`."""
        integers = {tensor.name: tensor.unsigned(results[tensor.name]) for tensor in self.outputs}
        return list(evaluated(self.after, {**feed, **integers}).values())

    def float_products(self) -> list[str]:
        """Names of the MatMuls outside the integer part."""
        nodes = (*self.before.graph.node, *self.after.graph.node)
        return [node.name or node.output[0] for node in nodes if node.op_type in ("MatMul", "Gemm")]


def evaluated(model: onnx.ModelProto, feed: Mapping[str, Array]) -> dict[str, Array]:
    """Run a graph operator by operator, as ONNX defines them."""
    names = [value.name for value in model.graph.output]
    given = {value.name: feed[value.name] for value in model.graph.input}
    return dict(zip(names, ReferenceEvaluator(model).run(names, given), strict=True))


def read(model: onnx.ModelProto) -> QuantizedGraph:
    """Return the parts of a graph of static shapes.

    It ends the process, with one line that says why, where a tensor between operators is not quantized.
    """
    return _Reader(onnx.shape_inference.infer_shapes(model, data_prop=True)).graph()


def stored_once(graph: QuantizedGraph) -> QuantizedGraph:
    """Return the graph with constants of sums and masks that are alike for all matrices stored for one."""
    operators = [
        replace(operator, inputs=tuple(map(_for_one, operator.inputs)))
        if operator.kind in BROADCASTS
        else operator
        for operator in graph.operators
    ]
    return replace(graph, operators=tuple(operators))


def _for_one(tensor: Tensor) -> Tensor:
    values = tensor.values
    if values is None or values.ndim < 3 or not (values == values[:, :1]).all():
        return tensor
    return replace(tensor, name=f"{tensor.name}/once", shape=values[:, :1].shape, values=values[:, :1])


def refuse(reason: str) -> NoReturn:
    """End this process with one line."""
    raise SystemExit(reason)


class _Reader:
    """Follows a graph from its inputs to its outputs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.constants = {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.values = {
            value.name: value.type.tensor_type
            for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
        }
        #: Float tensors that are quantized.
        self.quantized = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
        #: Integer tensors that are not constants, by name.
        self.tensors: dict[str, Tensor] = {}
        #: The tensors behind dequantized ones.
        self.dequantized: dict[str, Tensor] = {}
        #: Float tensors that depend on integers.
        self.behind: set[str] = set()
        self.inputs: list[Tensor] = []
        self.operators: list[Operator] = []

    def graph(self) -> QuantizedGraph:
        for node in self.model.graph.node:
            if node.op_type == "DequantizeLinear":
                self._dequantize(node)
            elif node.op_type == "QuantizeLinear":
                self._quantize(node)
            elif self._is_copy(node):
                self.dequantized[node.output[0]] = self.dequantized[node.input[0]]
            elif any(name in self.behind for name in node.input):
                self.behind.update(node.output)
        given = [value.name for value in self.model.graph.input]
        returned = [value.name for value in self.model.graph.output]
        outputs = list(dict.fromkeys(self._results(returned)))
        return QuantizedGraph(
            before=self._part(given, [tensor.name for tensor in self.inputs]),
            inputs=tuple(self.inputs),
            operators=tuple(self.operators),
            outputs=tuple(self.tensors[name] for name in outputs),
            after=self._part([*outputs, *(name for name in given if name not in outputs)], returned),
        )

    def _dequantize(self, node: onnx.NodeProto) -> None:
        source = node.input[0]
        tensor = self._tensor(source, node)
        if source in self.constants:
            # Two grids may share the integers of a constant, but not its name.
            values, name = tensor.signed(self.constants[source]), node.output[0]
            self.dequantized[name] = replace(tensor, name=name, values=values)
            return
        if source not in self.tensors:
            self._enter(tensor)
        elif self.tensors[source].grid != tensor.grid:
            refuse(f"the integers {source!r} are read on another grid than they were written on")
        self.dequantized[node.output[0]] = self.tensors[source]
        self.behind.add(node.output[0])

    def _is_copy(self, node: onnx.NodeProto) -> bool:
        """Whether a node multiplies by the identity inside another operator, to keep it from fusing."""
        if node.op_type != "MatMul" or node.output[0] in self.quantized:
            return False
        left, right = (self.dequantized.get(name) for name in node.input)
        if left is None or right is None or right.values is None:
            return False
        return bool((right.values * right.scale == np.eye(right.shape[-1])).all())

    def _quantize(self, node: onnx.NodeProto) -> None:
        source, name = node.input[0], node.output[0]
        tensor = self._tensor(name, node)
        if source in self.dequantized:
            self._append(
                Operator(kind=node.op_type, name=node.name, inputs=(self.dequantized[source],), output=tensor)
            )
        elif source in self.behind:
            self._append(self._operator(self.producers[source], tensor))
        else:
            self._enter(tensor)

    def _enter(self, tensor: Tensor) -> None:
        self.inputs.append(tensor)
        self.tensors[tensor.name] = tensor

    def _append(self, operator: Operator) -> None:
        grids = {tensor.grid for tensor in (*operator.inputs, operator.output)}
        if operator.kind in MOVES and len(grids) > 1:
            refuse(f"{operator.kind} {operator.name!r} moves integers from one grid to another")
        self.operators.append(operator)
        self.tensors[operator.output.name] = operator.output

    def _operator(self, node: onnx.NodeProto, output: Tensor) -> Operator:
        count = DATA_INPUTS.get(node.op_type, len(node.input))
        inputs = [self._operand(node, name) for name in node.input[:count]]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        names = [parameter.name for parameter in onnx.defs.get_schema(node.op_type).inputs]
        for name, given in list(zip(names, node.input, strict=False))[count:]:
            if given:
                attributes[name] = self.constants[given]
        return Operator(
            kind=node.op_type,
            name=node.name or node.output[0],
            inputs=tuple(inputs),
            output=output,
            attributes=attributes,
        )

    def _operand(self, node: onnx.NodeProto, name: str) -> Tensor:
        if name not in self.dequantized:
            refuse(
                f"{node.op_type} {node.name or node.output[0]!r} reads {name!r}, which is not quantized, "
                "and this NPU has no float operators; use a plan with requantize='multiplier'"
            )
        return self.dequantized[name]

    def _tensor(self, name: str, node: onnx.NodeProto) -> Tensor:
        scale, zero = (self.constants[name] for name in node.input[1:3])
        if zero.dtype.name not in OFFSETS or scale.size != 1:
            refuse(
                f"tensor {name!r} has {scale.size} scales and the type {zero.dtype}; export with one "
                f"scale for each tensor and one of {', '.join(OFFSETS)}"
            )
        element, offset = OFFSETS[zero.dtype.name]
        return Tensor(
            name=name,
            shape=self._shape(name),
            element=element,
            scale=float(scale.reshape(())),
            zero_point=int(zero.reshape(())) - offset,
            offset=offset,
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self.constants:
            return self.constants[name].shape
        sizes = tuple(axis.dim_value for axis in self.values[name].shape.dim)
        if not all(sizes):
            refuse(f"tensor {name!r} has no static shape; export with a batch")
        return sizes

    def _results(self, names: Iterable[str]) -> Iterator[str]:
        """Yield the integer tensors from which float operators make the named ones."""
        for name in names:
            if name in self.tensors:
                yield name
            elif name in self.producers:
                yield from self._results(self.producers[name].input)

    def _part(self, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
        part = Extractor(self.model).extract_model(inputs, outputs)
        for imported in part.opset_import:
            if not imported.domain:
                imported.version = max(imported.version, FIRST_OPSET)
        return part
