"""Writes the integer part of a QDQ graph as a TFLite file; needs NumPy and the schema of ai-edge-litert.

Every tensor keeps its integers, its scale and its zero point: TFLite's definition of each operator
is that of ONNX between DequantizeLinear and QuantizeLinear, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from quantized_graph import Array, Operator, QuantizedGraph, Tensor, refuse

Builtin, Options = schema.BuiltinOperator, schema.BuiltinOptions
TYPES = {"int8": schema.TensorType.INT8, "int16": schema.TensorType.INT16, "int32": schema.TensorType.INT32}
#: Operators whose inputs are those of ONNX, with the type of their options.
PLAIN = {
    "MatMul": (Builtin.BATCH_MATMUL, "BatchMatMulOptions"),
    "Add": (Builtin.ADD, "AddOptions"),
    "Sub": (Builtin.SUB, "SubOptions"),
    "Mul": (Builtin.MUL, "MulOptions"),
    "QuantizeLinear": (Builtin.QUANTIZE, "QuantizeOptions"),
}
#: Operators whose terms the kernels bring onto one grid.
SUMS = ("Add", "Sub")
#: How many times the scale of a sum that of a term may be, by the sum's type: the kernels shift terms by
#: 20 or 15 bits, and abort the process where the shifted sum needs a factor of 1 or more.
SUM_RATIOS = {"int8": 2**19, "int16": 2**14}
#: Versions of operators from which on they take int16 as well as int8.
VERSIONS = {
    Builtin.BATCH_MATMUL: 4,
    Builtin.QUANTIZE: 2,
    Builtin.CONCATENATION: 3,
    Builtin.STRIDED_SLICE: 2,
    Builtin.TRANSPOSE: 2,
    Builtin.RESHAPE: 1,
    Builtin.MINIMUM: 2,
    Builtin.MAXIMUM: 2,
    Builtin.ADD: 2,
    Builtin.SUB: 2,
    Builtin.MUL: 2,
}


def write(graph: QuantizedGraph) -> bytes:
    """Return the file of ``graph.operators``, from ``graph.inputs`` to ``graph.outputs``.

    It ends the process, with one line, where TFLite or this module has no such operator.
    """
    return _Writer().file(graph)


def operand_element(operator: Operator) -> str:
    """Type of all operands in the file: TFLite takes tensors of one type only."""
    return max((tensor.element for tensor in operator.inputs), key=lambda name: np.iinfo(name).bits)


class _Writer:
    """Collects tensors, buffers and operators of one file."""

    def __init__(self) -> None:
        self.part = schema.SubGraphT()
        self.part.name, self.part.tensors, self.part.operators = b"main", [], []
        self.model = schema.ModelT()
        self.model.version, self.model.description = 3, b"qinvert"
        # The first buffer is that of tensors without data.
        self.model.buffers, self.model.operatorCodes = [schema.BufferT()], []
        self.model.subgraphs = [self.part]
        self.places: dict[str, int] = {}
        self.codes: dict[int, int] = {}
        self.special: dict[str, Callable[[Operator], None]] = {
            "Concat": self._concat,
            "Slice": self._slice,
            "Transpose": self._transpose,
            "Reshape": self._reshape,
            "Clip": self._clip,
        }

    def file(self, graph: QuantizedGraph) -> bytes:
        self.part.inputs = [self._place(tensor) for tensor in graph.inputs]
        for operator in graph.operators:
            if operator.kind in PLAIN:
                self._append(*PLAIN[operator.kind], self._operands(operator), operator.output)
            elif operator.kind in self.special:
                self.special[operator.kind](operator)
            else:
                known = ", ".join(sorted({*PLAIN, *self.special}))
                refuse(
                    f"no TFLite operator is known for {operator.kind} {operator.name!r}; known are {known}"
                )
        self.part.outputs = [self._place(tensor) for tensor in graph.outputs]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _append(
        self,
        builtin: int,
        options: str,
        inputs: Sequence[Tensor | int],
        output: Tensor,
        **fields: Any,
    ) -> None:
        made = schema.OperatorT()
        made.opcodeIndex = self._code(builtin)
        made.inputs = [self._place(given) if isinstance(given, Tensor) else given for given in inputs]
        made.outputs = [self._place(output)]
        made.builtinOptionsType = getattr(Options, options)
        made.builtinOptions = getattr(schema, f"{options}T")()
        for name, value in fields.items():
            setattr(made.builtinOptions, name, value)
        self.part.operators.append(made)

    def _code(self, builtin: int) -> int:
        if builtin not in self.codes:
            code = schema.OperatorCodeT()
            code.builtinCode, code.version = builtin, VERSIONS[builtin]
            # Readers of the first versions see the last number that they know.
            code.deprecatedBuiltinCode = min(builtin, Builtin.PLACEHOLDER_FOR_GREATER_OP_CODES)
            self.codes[builtin] = len(self.model.operatorCodes)
            self.model.operatorCodes.append(code)
        return self.codes[builtin]

    def _place(self, tensor: Tensor) -> int:
        if tensor.name not in self.places:
            made = self._tensor(tensor.name, tensor.shape, tensor.element, tensor.values)
            made.quantization = schema.QuantizationParametersT()
            made.quantization.scale = [tensor.scale]
            made.quantization.zeroPoint = [tensor.zero_point]
        return self.places[tensor.name]

    def _indices(self, values: list[int]) -> int:
        """Place of a constant int32 tensor."""
        name = f"indices/{'_'.join(map(str, values))}"
        if name not in self.places:
            self._tensor(name, (len(values),), "int32", np.asarray(values, np.int32))
        return self.places[name]

    def _tensor(self, name: str, shape: tuple[int, ...], element: str, values: Array | None) -> Any:
        made = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name.encode(), list(shape), TYPES[element], 0
        if values is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
            made.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        self.places[name] = len(self.part.tensors)
        self.part.tensors.append(made)
        return made

    def _operands(self, operator: Operator) -> list[Tensor]:
        if operator.kind in SUMS:
            _check_sum(operator)
        return [self._widened(tensor, operand_element(operator)) for tensor in operator.inputs]

    def _widened(self, tensor: Tensor, element: str) -> Tensor:
        """Return the same integers in a wider type: operands are of one type."""
        if tensor.element == element:
            return tensor
        wide = replace(tensor, name=f"{tensor.name}/{element}", element=element)
        if tensor.values is not None:
            return replace(wide, values=tensor.values.astype(element))
        if wide.name not in self.places:
            self._append(*PLAIN["QuantizeLinear"], (tensor,), wide)
        return wide

    def _concat(self, operator: Operator) -> None:
        axis = int(operator.attributes["axis"])
        self._append(
            Builtin.CONCATENATION, "ConcatenationOptions", operator.inputs, operator.output, axis=axis
        )

    def _slice(self, operator: Operator) -> None:
        (source,) = operator.inputs
        given, rank = operator.attributes, len(source.shape)
        starts, ends = [0] * rank, list(source.shape)
        axes = given.get("axes", range(len(given["starts"])))
        if any(step != 1 for step in given.get("steps", ())):
            refuse(f"Slice {operator.name!r} leaves elements out; only steps of 1 are written")
        for axis, start, end in zip(axes, given["starts"], given["ends"], strict=True):
            # As Python reads them: negative ones count from the end, others stop there.
            starts[axis], ends[axis], _ = slice(int(start), int(end)).indices(source.shape[axis])
        corners = [self._indices(values) for values in (starts, ends, [1] * rank)]
        self._append(Builtin.STRIDED_SLICE, "StridedSliceOptions", (source, *corners), operator.output)

    def _transpose(self, operator: Operator) -> None:
        (source,) = operator.inputs
        order = operator.attributes.get("perm", range(len(source.shape))[::-1])
        places = (source, self._indices([int(axis) for axis in order]))
        self._append(Builtin.TRANSPOSE, "TransposeOptions", places, operator.output)

    def _reshape(self, operator: Operator) -> None:
        (source,), shape = operator.inputs, list(operator.output.shape)
        places = (source, self._indices(shape))
        self._append(Builtin.RESHAPE, "ReshapeOptions", places, operator.output, newShape=shape)

    def _clip(self, operator: Operator) -> None:
        """``min(max(q, low), high)``, with the integers that ONNX cuts at."""
        (source,), output = operator.inputs, operator.output
        if source.grid != output.grid:
            refuse(f"Clip {operator.name!r} changes the grid; quantize its result on the grid of its input")
        ends = [self._end(operator, name) for name in ("min", "max")]
        between = replace(output, name=f"{output.name}/low")
        self._append(Builtin.MAXIMUM, "MaximumMinimumOptions", (source, ends[0]), between)
        self._append(Builtin.MINIMUM, "MaximumMinimumOptions", (between, ends[1]), output)

    def _end(self, operator: Operator, name: str) -> Tensor:
        source = operator.inputs[0]
        quotient = np.float32(operator.attributes[name]) / np.float32(source.scale)
        value = round(float(quotient)) + source.zero_point
        limits = np.iinfo(source.element)
        values = np.full((1,) * len(source.shape), np.clip(value, limits.min, limits.max), source.element)
        return replace(source, name=f"{operator.name}/{name}", shape=values.shape, values=values)


def _check_sum(operator: Operator) -> None:
    largest, ratio = max(tensor.scale for tensor in operator.inputs), SUM_RATIOS[operator.output.element]
    if largest >= operator.output.scale * ratio:
        refuse(
            f"{operator.kind} {operator.name!r} has a scale of {operator.output.scale:g} for terms of "
            f"{largest:g}; TFLite takes less than {ratio} times as much; use another method"
        )
