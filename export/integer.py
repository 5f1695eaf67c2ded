"""Integer lowering: MatMulInteger and int8 tensors, the literal integer program."""

from __future__ import annotations

import numpy as np

from qinvert import arithmetic
from qinvert.execute import constant_matrix
from qinvert.export.lowering import GraphLowering, Int8Array, Value
from qinvert.plan import Quantization, Requantize
from qinvert.steps import INPUT, Add, Mask, MatMul, Rescale, Slice


class IntegerLowering(GraphLowering):
    """Values are int8 tensors; each node computes one float32 rounding of the simulator."""

    def source(self, name: str) -> Value:
        return self._quantized(INPUT, name, self.grid(INPUT).scale)

    def finish(self, name: str) -> str:
        output = self.plan.program.output
        inputs = [self.stored(output), self.scale(self.plan.output), self.zero_point]
        return self.graph.node("DequantizeLinear", inputs, name, self.shape(output))

    def literal(self, name: str, array: Int8Array, grid: Quantization) -> str:
        return self.graph.initializer(f"{name}/int8", array)

    def joined(self, name: str, parts: list[str], axis: int, shape: list[int], grid: Quantization) -> str:
        return self.graph.node("Concat", parts, name, shape, "int8", axis=axis)

    def matmul(
        self, step: MatMul, left: Value, right: Value, add: list[Value], subtract: list[Value]
    ) -> Value:
        if self.plan.requantize is Requantize.MULTIPLIER:
            steps = self._product(step, self.widened(step, left, right), self.plan.multiplier(step))
            return self._quantized(step.output, steps, 1.0)
        unit = arithmetic.product_scale(self.grid(step.left).scale, self.grid(step.right).scale)
        total = self._product(step, (left.name, right.name), unit)
        terms = [("Add", term) for term in add] + [("Sub", term) for term in subtract]
        for i, (operator, term) in enumerate(terms, start=1):
            real = self._dequantized(f"{step.output}/residual_{i}", term)
            total = self.graph.node(
                operator, [total, real], f"{step.output}/sum_{i}", self.shape(step.output)
            )
        return self._quantized(step.output, total, self.grid(step.output).scale)

    def _product(self, step: MatMul, operands: tuple[str, str], factor: float) -> str:
        name, shape = step.output, self.shape(step.output)
        inputs = [*operands, self.zero_point, self.zero_point]
        accumulator = self.graph.node("MatMulInteger", inputs, f"{name}/accumulator", shape, "int32")
        real = self.graph.node("Cast", [accumulator], f"{name}/cast", shape, to=1)
        constant = self.graph.scalar(f"factor/{factor!r}", factor)
        return self.graph.node("Mul", [real, constant], f"{name}/product", shape)

    def add(self, step: Add, left: Value, right: Value) -> Value:
        name = step.output
        sides = [
            self._dequantized(f"{name}/{side}", value) for side, value in (("left", left), ("right", right))
        ]
        total = self.graph.node("Add", sides, f"{name}/sum", self.shape(name))
        return self._quantized(name, total, self.grid(name).scale)

    def rescale(self, step: Rescale, source: Value) -> Value:
        real = self._dequantized(f"{step.output}/scaled", source)
        if step.factor != 1:
            factor = self.graph.scalar(f"factor/{step.factor!r}", step.factor)
            real = self.graph.node("Mul", [real, factor], f"{step.output}/product", self.shape(step.output))
        return self._quantized(step.output, real, self.grid(step.output).scale)

    def mask(self, step: Mask, source: Value, constant: Value) -> Value:
        assert constant.constant is not None
        # All bits set where the mask is 1.
        bits = -constant_matrix(constant.constant).numpy().astype(np.int8)[None, None]
        inputs = [source.name, self.graph.initializer(f"{constant.tensor}/bits", bits)]
        return Value(
            self.graph.node("BitwiseAnd", inputs, step.output, self.shape(step.output), "int8"), step.output
        )

    def slice(self, step: Slice, source: Value) -> Value:
        inputs = [source.name, *self.slice_inputs(step)]
        return Value(
            self.graph.node("Slice", inputs, step.output, self.shape(step.output), "int8"), step.output
        )

    def _dequantized(self, name: str, value: Value) -> str:
        # Cast and Mul, not DequantizeLinear: optimizers fuse dequantize, operator and
        # quantize into kernels that round in another order.
        shape = self.shape(value.tensor)
        real = self.graph.node("Cast", [value.name], f"{name}/cast", shape, to=1)
        return self.graph.node("Mul", [real, self.scale(self.grid(value.tensor))], name, shape)

    def _quantized(self, tensor: str, value: str, scale: float) -> Value:
        fmt, shape = self.grid(tensor).format, self.shape(tensor)
        if (fmt.minimum, fmt.maximum) != (-128, 127):
            bounds = [self.graph.scalar(f"clip/{scale * q!r}", scale * q) for q in (fmt.minimum, fmt.maximum)]
            value = self.graph.node("Clip", [value, *bounds], f"{tensor}/clip", shape)
        inputs = [value, self.graph.scalar(f"scale/{scale!r}", scale), self.zero_point]
        return Value(self.graph.node("QuantizeLinear", inputs, self.stored(tensor), shape, "int8"), tensor)
