"""Integer products of a graph, in whatever form it has them, and how far they sum up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from qinvert.export.rules.graph_index import CASTS, COLUMNS, ROWS, Grid, Structure, join_axis, joins

Magnitudes: TypeAlias = npt.NDArray[np.float64]

#: Positions of the two operands of a product, by operator.
OPERANDS: Final = {"MatMul": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3)}
#: Nodes that magnitudes are followed back through: a join, and its split into two planes.
MAX_STEPS: Final = 12
#: Operands with more elements per block are bounded by their types alone.
MAX_ELEMENTS: Final = 2**25


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """Integers that a product multiplies, ``q - zero_point``."""

    #: Tensor of the integers.
    tensor: str
    #: Integer that means 0.0.
    zero_point: int
    #: NumPy name of the type.
    element: str

    @property
    def magnitude(self) -> int:
        """Largest ``|q - zero_point|``."""
        return Grid(scale=1.0, zero_point=self.zero_point, element=self.element).magnitude


def products(structure: Structure) -> Iterator[tuple[onnx.NodeProto, Operand, Operand]]:
    """Yield every product of two quantized tensors."""
    for node in structure.nodes:
        if node.op_type in OPERANDS:
            left, right = (_operand(structure, node, at) for at in OPERANDS[node.op_type])
            if left is not None and right is not None:
                yield node, left, right


def _operand(structure: Structure, node: onnx.NodeProto, at: int) -> Operand | None:
    if node.op_type == "MatMul":
        return _dequantized(structure, node.input[at])
    # MatMulInteger and QLinearMatMul have an operand's zero point two places after it.
    return _integers(structure, node.input[at], structure.zero_point(node, at + 2))


def _dequantized(structure: Structure, name: str) -> Operand | None:
    if structure.operator(name) != "DequantizeLinear":
        return None
    node = structure.writers[name]
    return _integers(structure, node.input[0], structure.zero_point(node, 2))


def _integers(structure: Structure, name: str, zero: tuple[str, int] | None) -> Operand | None:
    element = structure.element(name)
    if element is None or not np.issubdtype(element, np.integer):
        return None
    return Operand(tensor=name, zero_point=zero[1] if zero is not None else 0, element=element)


def accumulator_bound(structure: Structure, left: Operand, right: Operand, enough: float) -> float:
    """``max_ij sum_k max|a_ik| max|b_kj|`` over all integers that the operands can hold.

    A bound that is at most ``enough``, or that has very large operands, may be the
    looser ``K max|a| max|b|``, which counts every element of an identity block.
    """
    a, b = structure.shape(left.tensor), structure.shape(right.tensor)
    if a is None or b is None or min(len(a), len(b)) < 2 or a[-1] != b[-2]:
        return 0.0
    simple = float(a[-1] * left.magnitude * right.magnitude)
    if simple <= enough or a[-1] * max(a[-2], b[-1]) > MAX_ELEMENTS:
        return simple
    return float((_magnitudes(structure, left, a) @ _magnitudes(structure, right, b)).max())


def _magnitudes(structure: Structure, operand: Operand, shape: list[int]) -> Magnitudes:
    """Largest magnitude of each element over all blocks, ``[rows, columns]``."""
    tensor, zero = operand.tensor, operand.zero_point
    while structure.operator(tensor) in CASTS:
        # They shift int8 to the operand's zero point.
        tensor, zero = structure.writers[tensor].input[0], 0
    node = structure.writers.get(tensor)
    found = None
    if node is not None and node.op_type == "QuantizeLinear":
        found = _rounded(structure, node, MAX_STEPS)
    elif node is not None:
        found = _joined(node, [_integer_magnitudes(structure, name, zero) for name in node.input])
    return np.full(shape[-2:], float(operand.magnitude)) if found is None else found


def _integer_magnitudes(structure: Structure, name: str, zero: int) -> Magnitudes | None:
    operand = _integers(structure, name, ("", zero))
    if operand is None:
        return None
    constant = structure.constant(name)
    if constant is not None:
        return _largest(np.abs(constant.astype(np.float64) - zero))
    return np.full((structure.shape(name) or [1, 1])[-2:], float(operand.magnitude))


def _rounded(structure: Structure, node: onnx.NodeProto, steps: int) -> Magnitudes | None:
    """Magnitudes of the integers that a QuantizeLinear writes."""
    real, grid = _real_magnitudes(structure, node.input[0], steps - 1), structure.grid(node)
    if real is None or grid is None:
        return None
    # A value exactly between two steps may go either way.
    return np.minimum(np.floor(real / grid.scale + 0.5), grid.magnitude)


def _real_magnitudes(structure: Structure, name: str, steps: int) -> Magnitudes | None:
    """Magnitudes of a float tensor, followed through joins, splits into planes and their sums."""
    node = structure.writers.get(name)
    if node is None or steps <= 0:
        return None
    if node.op_type == "DequantizeLinear":
        return _dequantized_magnitudes(structure, node, steps)
    if node.op_type not in ("Concat", "Add", "Sub"):
        return None
    parts = [_real_magnitudes(structure, part, steps - 1) for part in node.input]
    if node.op_type == "Concat":
        return _joined(node, parts)
    first, second = parts
    same = first is not None and second is not None and first.shape == second.shape
    return first + second if same and first is not None and second is not None else None


def _dequantized_magnitudes(structure: Structure, node: onnx.NodeProto, steps: int) -> Magnitudes | None:
    grid, integers = structure.grid(node), node.input[0]
    if grid is None:
        return None
    constant, writer = structure.constant(integers), structure.writers.get(integers)
    if constant is not None:
        return _largest(np.abs(constant.astype(np.float64) - grid.zero_point)) * grid.scale
    found = None
    if writer is not None and writer.op_type == "QuantizeLinear":
        found = _rounded(structure, writer, steps - 1)
    if found is None:
        shape = structure.shape(integers) or [1, 1]
        found = np.full(shape[-2:], float(grid.magnitude))
    return found * grid.scale


def _largest(array: Magnitudes) -> Magnitudes:
    return np.asarray(array.reshape(-1, *array.shape[-2:]).max(axis=0))


def _joined(node: onnx.NodeProto, parts: list[Magnitudes | None]) -> Magnitudes | None:
    if not joins(node, ROWS) and not joins(node, COLUMNS):
        return None
    known = [part for part in parts if part is not None]
    return np.concatenate(known, axis=join_axis(node) - 2) if len(known) == len(parts) else None
