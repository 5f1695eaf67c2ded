"""What a graph says about its tensors: who writes and reads each, its shape, its grid."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from qinvert.errors import ExportError, reason

Array: TypeAlias = npt.NDArray[Any]

#: Axes of a tensor ``[1, B, R, C]``.
ROWS: Final = 2
COLUMNS: Final = 3
#: Operators that change a container and not the value.
CASTS: Final = ("Cast", "BitwiseXor")
#: Operators between two grids or containers.
BRIDGES: Final = ("QuantizeLinear", "DequantizeLinear", "Clip", *CASTS)
#: Inputs (scale, zero point) of the grids that a node names, by operator.
GRID_INPUTS: Final = {
    "QuantizeLinear": ((1, 2),),
    "DequantizeLinear": ((1, 2),),
    "QLinearMatMul": ((1, 2), (4, 5), (6, 7)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Real value = ``(q - zero_point) * scale`` with ``q`` in a container."""

    #: float32 scale as a Python float.
    scale: float
    #: Integer that means 0.0.
    zero_point: int
    #: NumPy name of the container's type.
    element: str

    @property
    def magnitude(self) -> int:
        """Largest ``|q - zero_point|`` in the container."""
        limits = np.iinfo(self.element)
        return max(int(limits.max) - self.zero_point, self.zero_point - int(limits.min))


class Structure:
    """Index of one graph, whose nodes are in order and whose tensors are written once.

    A Constant node is a constant like any initializer, and does not count as a node.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.name = model.graph.name
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        for node in map(_qualified, model.graph.node):
            tensor = _constant(node)
            if tensor is None:
                self.nodes.append(node)
            else:
                self._initializers[node.output[0]] = tensor
        self.inputs = {value.name for value in model.graph.input}
        self.outputs = {value.name for value in model.graph.output}
        self.writers = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in filter(None, node.input):
                self.readers[name].append(node)
        declared = (*model.graph.value_info, *model.graph.input, *model.graph.output)
        self._types = {value.name: value.type.tensor_type for value in declared}
        self._arrays: dict[str, Array] = {}
        self._memo: dict[str, set[str]] = {}

    def memo(self, name: str, find: Callable[[Structure], set[str]]) -> set[str]:
        """Return the named set of tensors, found once per graph."""
        if name not in self._memo:
            self._memo[name] = find(self)
        return self._memo[name]

    @property
    def activations(self) -> Iterator[str]:
        """Every tensor that is not a constant, inputs first."""
        yield from (name for name in self.inputs if name not in self._initializers)
        yield from self.writers

    def operator(self, name: str) -> str:
        """Operator that writes a tensor; empty for inputs and constants."""
        return self.writers[name].op_type if name in self.writers else ""

    def source(self, name: str) -> onnx.NodeProto | None:
        """Node that made a tensor's values, seen through quantization and casts."""
        while self.operator(name) in BRIDGES:
            name = self.writers[name].input[0]
        return self.writers.get(name)

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is a constant, wherever its values lie."""
        return name in self._initializers

    def constant(self, name: str) -> Array | None:
        """Values of a constant; None for other tensors, and for constants that lie in another file.

        Raises
        ------
        ExportError
            If the values do not fit the declared shape and type.
        """
        tensor = self._initializers.get(name)
        if tensor is None or uses_external_data(tensor):
            return None
        if name not in self._arrays:
            try:
                self._arrays[name] = numpy_helper.to_array(tensor)
            except Exception as error:  # onnx raises unrelated types here
                raise ExportError(
                    f"constant {name!r} is damaged ({reason(error)}); export it again"
                ) from None
        return self._arrays[name]

    def shape(self, name: str) -> list[int] | None:
        """Static shape of a tensor; None if a size is unknown."""
        if name in self._initializers:
            return list(self._initializers[name].dims)
        declared = self._types.get(name)
        if declared is None or not declared.HasField("shape"):
            return None
        sizes = [d.dim_value if d.HasField("dim_value") else 0 for d in declared.shape.dim]
        return sizes if all(size > 0 for size in sizes) else None

    def rank(self, name: str) -> int | None:
        """Axes of a tensor, whether or not their sizes are known; None if their number is unknown."""
        if name in self._initializers:
            return len(self._initializers[name].dims)
        declared = self._types.get(name)
        return len(declared.shape.dim) if declared is not None and declared.HasField("shape") else None

    def element(self, name: str) -> str | None:
        """NumPy name of a tensor's type; None if it is unknown."""
        declared = self._initializers.get(name)
        kind = declared.data_type if declared is not None else getattr(self._types.get(name), "elem_type", 0)
        return helper.tensor_dtype_to_np_dtype(kind).name if kind else None

    def zero_point(self, node: onnx.NodeProto, position: int) -> tuple[str, int] | None:
        """Element and value of a scalar zero point; None if it is left out or not a constant."""
        array = self.constant(node.input[position]) if len(node.input) > position else None
        return (array.dtype.name, int(array.reshape(()))) if array is not None and array.size == 1 else None

    def grid(self, node: onnx.NodeProto, index: int = 0) -> Grid | None:
        """Grid that a node names (see `GRID_INPUTS`); None unless constant and per tensor."""
        scale_at, zero_at = GRID_INPUTS[node.op_type][index]
        scale, zero = self.constant(node.input[scale_at]), self.zero_point(node, zero_at)
        if scale is None or scale.size != 1 or zero is None or not np.issubdtype(zero[0], np.integer):
            return None
        return Grid(scale=float(scale.reshape(())), element=zero[0], zero_point=zero[1])


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    if node.op_type != "Constant" or len(node.output) != 1:
        return None
    return next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)


def _qualified(node: onnx.NodeProto) -> onnx.NodeProto:
    # An operator of another domain is another operator, whatever its name is.
    if node.domain in ("", "ai.onnx"):
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.op_type = f"{node.domain}.{node.op_type}"
    return copy


def joins(node: onnx.NodeProto, axis: int) -> bool:
    """Whether a node is a Concat along that axis of four."""
    return node.op_type == "Concat" and join_axis(node) == axis


def join_axis(node: onnx.NodeProto) -> int:
    """Axis of a Concat of four axes, counted from the front."""
    return int(attribute(node, "axis", 0)) % 4


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Value of a node's attribute."""
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)
