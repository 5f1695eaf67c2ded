"""QLinearMatMul lowering: products take int8 and return int8."""

from __future__ import annotations

from dataclasses import replace

from qinvert.export.lowering.base import Value
from qinvert.export.lowering.integer import IntegerLowering
from qinvert.plan.quantization import Requantize
from qinvert.program.steps import MatMul


class QLinearLowering(IntegerLowering):
    """Like `IntegerLowering`, with one node for a product that one factor requantizes."""

    def matmul(
        self, step: MatMul, left: Value, right: Value, add: list[Value], subtract: list[Value]
    ) -> Value:
        if self.plan.requantize is not Requantize.MULTIPLIER:
            # QLinearMatMul rounds by one factor, which is not the plan's rounding.
            return super().matmul(step, left, right, add, subtract)
        *operands, ones = self.widened(step, left, self.operand(right))
        zero, element = self.zero_point(self.stored_format), self.stored_format.element
        inputs: list[str] = []
        for operand, tensor in zip(operands, (step.left, step.right), strict=True):
            inputs += [operand, self.scale_of(self.grid(tensor)), zero]
        inputs += [self.scale_of(self.grid(step.output)), zero]
        output, shape = self.stored(step.output), self.shape(step.output)
        self.graph.node("QLinearMatMul", inputs, output, shape, element)
        return replace(self.value(step.output), ones=ones)


LOWERING = QLinearLowering
