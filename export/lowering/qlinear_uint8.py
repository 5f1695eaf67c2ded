"""QLinearMatMul lowering in uint8 with the zero point 128: the operators that CPUs run fastest.

onnxruntime multiplies uint8 several times faster than int8 on x86, and its
Where, Max and Min of bytes take less time than a quantized Mul or Add.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qinvert.export.graph import Sizes
from qinvert.export.lowering.base import Value
from qinvert.export.lowering.qlinear import QLinearLowering
from qinvert.export.lowering.tensors import IntArray
from qinvert.formats import UINT8
from qinvert.numerics import scalar
from qinvert.plan.quantization import Quantization
from qinvert.program.ports import Meaning, Port
from qinvert.program.sparsity import Support, constant_support
from qinvert.program.steps import Mask


class UnsignedLowering(QLinearLowering):
    """As `QLinearLowering`, with every integer stored as ``q + 128``."""

    stored_format = UINT8

    def literal(self, name: str, array: IntArray, grid: Quantization, *, spread: bool = False) -> str:
        shifted = (array.astype(np.int16) + UINT8.zero_point).astype(UINT8.element)
        values = self.graph.initializer(f"{name}/{UINT8.element}", shifted)
        return self.spread(values, array, UINT8.element) if spread else values

    def mask(self, step: Mask, source: Value, constant: Value) -> Value:
        assert constant.constant is not None
        keep = constant_support(constant.constant)[None, None]
        inputs = [
            self.graph.initializer(f"{constant.tensor}/keep", keep),
            self.plain(source).name,
            self.zero_point(UINT8),
        ]
        self.graph.node("Where", inputs, self.stored(step.output), self.shape(step.output), UINT8.element)
        return self.value(step.output)

    def _shift(self, value: Value, ones: Support, sign: int) -> Value:
        """Add or remove ones where the tensor itself is zero: there, a maximum or minimum sets the value."""
        tensor, zero = value.tensor, UINT8.zero_point
        if (tensor, sign) not in self._shifted:
            operator, level, beside = (
                ("Max", zero + self.one_of(tensor), 0) if sign > 0 else ("Min", zero, 255)
            )
            bound = np.where(ones, level, beside).astype(UINT8.element)[None, None]
            name = f"{tensor}/{'plus' if sign > 0 else 'minus'}_identity"
            inputs = [value.name, self.graph.initializer(f"{name}/bound", bound)]
            self.graph.node(operator, inputs, name, self.shape(tensor), UINT8.element)
            self._shifted[tensor, sign] = Value(name, tensor, ones=ones if sign > 0 else None)
        return self._shifted[tensor, sign]

    def _integers(self, plane: str, output: str, shape: Sizes) -> str:
        cast = super()._integers(plane, f"{output}/uint8", shape)
        return self.graph.node("Sub", [cast, self.graph.scalar("zero_point/float", 128.0)], output, shape)

    def _end(self, port: Port, result: Value, name: str, inputs: Mapping[str, str]) -> None:
        # T from the integers of T: a Max of bytes is cheaper than an Add of floats.
        if port.meaning is Meaning.STRICT_INVERSE and self._holds_one(result.tensor):
            result = self.plus_identity(result)
        super()._end(port, result, name, inputs)

    def _holds_one(self, tensor: str) -> bool:
        """Whether the tensor can carry an identity that dequantizes to 1.0 exactly."""
        grid, one = self.grid(tensor), self.one_of(tensor)
        exact = scalar.dequantize_scalar(one, grid.scale, grid.format) == 1.0
        return exact and self.identities.carries(tensor)


LOWERING = UnsignedLowering
