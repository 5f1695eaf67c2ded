"""Graphs of one grid, written operator by operator: what sequential baselines are built with."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

#: Operator set and IR version, as in the profiles for NPUs.
OPSET, IR_VERSION = 19, 9
#: Axes of ``[1, batch, rows, columns]``.
BATCH, ROWS, COLUMNS = 1, 2, 3
#: ONNX type and zero point of what a graph takes and returns.
ELEMENTS = {
    "int8": (TensorProto.INT8, 0),
    "uint8": (TensorProto.UINT8, 128),
    "float16": (TensorProto.FLOAT16, 0),
}


@dataclass(kw_only=True)
class IntegerGraph:
    """Collects nodes; every tensor ``[1, b, rows, columns]`` is on one grid, ``x = scale (q - zero)``.

    With the type float16 nothing is quantized and the scale is unused.
    """

    chunk: int
    batch: int
    element: str
    scale: float
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """Whether tensors are integers."""
        return self.element != "float16"

    def constant(self, name: str, array: npt.NDArray[Any]) -> str:
        """Add a constant, once for each name."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def grid(self, scale: str) -> list[str]:
        """Names of scale and zero point: ``"step"``, or ``"unit"`` for constants of 0 and 1."""
        zero = ELEMENTS[self.element][1] if scale == "step" else 0
        value = np.array(self.scale if scale == "step" else 1, dtype=np.float32)
        return [
            self.constant(scale, value),
            self.constant(f"{scale}/zero", np.array(zero, dtype=self.element)),
        ]

    def raw(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """Append one node and return what it writes."""
        name = f"{operator}_{len(self.nodes)}"
        written = [name] if outputs == 1 else [f"{name}/{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), written, name=name, **attributes))
        return written

    def rounded(self, tensor: str) -> str:
        """Put a tensor onto the grid."""
        if not self.quantized:
            return tensor
        (integers,) = self.raw("QuantizeLinear", tensor, *self.grid("step"))
        return self.raw("DequantizeLinear", integers, *self.grid("step"))[0]

    def op(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Append an operator whose result is on the grid."""
        return self.rounded(self.raw(operator, *inputs, **attributes)[0])

    def cut(self, tensor: str, **edges: tuple[int, int]) -> str:
        """Slice by ``batch=``, ``rows=`` and ``columns=``."""
        axes = {"batch": BATCH, "rows": ROWS, "columns": COLUMNS}
        table = np.array([(*edge, axes[name]) for name, edge in edges.items()], dtype=np.int64).T
        return self.op("Slice", tensor, *(self.constant(f"indices/{v.tolist()}", v) for v in table))

    def split(self, tensor: str, sizes: list[int], axis: int) -> list[str]:
        """Split into parts of the given sizes."""
        lengths = self.constant(f"sizes/{sizes}", np.array(sizes, dtype=np.int64))
        parts = self.raw("Split", tensor, lengths, outputs=len(sizes), axis=axis)
        return [self.rounded(part) for part in parts]

    def concat(self, tensors: list[str], axis: int) -> str:
        """Join tensors; one alone stays as it is."""
        return tensors[0] if len(tensors) == 1 else self.op("Concat", *tensors, axis=axis)

    def mask(self, matrix: npt.NDArray[Any], batch: int) -> str:
        """Add a constant of 0 and 1, written out for the batch: compilers are slow where it broadcasts."""
        name = f"mask_{len(self.constants)}"
        values = np.broadcast_to(matrix, (1, batch, *matrix.shape)).astype(self.element)
        if not self.quantized:
            return self.constant(name, values)
        return self.raw("DequantizeLinear", self.constant(name, values), *self.grid("unit"))[0]

    def given(self) -> str:
        """Return M, the graph's input."""
        return self.raw("DequantizeLinear", "M", *self.grid("step"))[0] if self.quantized else "M"

    def zeros(self, batch: int) -> str:
        """Add a constant of zeros, written out for the batch."""
        values = np.full((1, batch, self.chunk, self.chunk), ELEMENTS[self.element][1], dtype=self.element)
        name = self.constant(f"zeros/{batch}", values)
        return self.raw("DequantizeLinear", name, *self.grid("step"))[0] if self.quantized else name

    def chains(self, tensor: str, count: int) -> list[str]:
        """Cut the batch into independent parts."""
        return self.parts(tensor, count, self.batch)

    def parts(self, tensor: str, count: int, batch: int) -> list[str]:
        """Cut a tensor of that batch into independent parts."""
        if batch % count:
            raise ValueError(f"{batch} matrices do not make {count} equal parts; choose other chains")
        size = batch // count
        if count == 1:
            return [tensor]
        return [self.cut(tensor, batch=(i * size, (i + 1) * size)) for i in range(count)]

    def model(self, result: str) -> onnx.ModelProto:
        """Return the checked model, which takes M and returns S = T - I, both of the graph's type."""
        if self.quantized:
            # The graph ends with the integers.
            last = self.nodes.pop()
            assert last.op_type == "DequantizeLinear"
            assert last.output[0] == result
            result = last.input[0]
        shape = [1, self.batch, self.chunk, self.chunk]
        port = partial(helper.make_tensor_value_info, elem_type=ELEMENTS[self.element][0], shape=shape)
        graph = helper.make_graph(
            self.nodes, "sequential", [port("M")], [port(result)], list(self.constants.values())
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        onnx.checker.check_model(model, full_check=True)
        return model
