"""Integer products of a graph, in whatever form it has them, and how far they sum up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from qinvert.export.structure import CASTS, COLUMNS, ROWS, Grid, Structure, join_axis, joins

Magnitudes: TypeAlias = npt.NDArray[np.float64]

#: Positions of the two operands of a product, by operator.
OPERANDS: Final = {"MatMul": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3)}


#: Operands of more elements a block are bounded by their types alone.
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

    A bound of at most ``enough``, or of very large operands, may be the
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
    node, operands = _join(structure, operand.tensor)
    if node is not None and (joins(node, ROWS) or joins(node, COLUMNS)):
        parts = [_part(structure, part) for part in operands if part is not None]
        if len(parts) == len(node.input):
            return np.concatenate(parts, axis=join_axis(node) - 2)
    return np.full(shape[-2:], float(operand.magnitude))


def _part(structure: Structure, operand: Operand) -> Magnitudes:
    constant = structure.constant(operand.tensor)
    shape = structure.shape(operand.tensor) or [1, 1]
    if constant is None:
        return np.full(shape[-2:], float(operand.magnitude))
    shifted = np.abs(constant.astype(np.float64) - operand.zero_point)
    return np.asarray(shifted.reshape(-1, *shape[-2:]).max(axis=0))


def _join(structure: Structure, tensor: str) -> tuple[onnx.NodeProto | None, list[Operand | None]]:
    """Node that joins other integers to these, and those integers."""
    while structure.operator(tensor) in CASTS:
        tensor = structure.writers[tensor].input[0]
    node = structure.writers.get(tensor)
    if node is None or node.op_type != "QuantizeLinear":
        return node, [_integers(structure, name, None) for name in node.input] if node else []
    # Joined as real numbers: the same integers only on the same grid.
    grid, joint = structure.grid(node), structure.writers.get(node.input[0])
    names = [name for name in joint.input if _grid_of(structure, name) == grid] if joint else []
    return joint, [_dequantized(structure, name) for name in names]


def _grid_of(structure: Structure, name: str) -> Grid | None:
    return structure.grid(structure.writers[name]) if structure.operator(name) == "DequantizeLinear" else None
