"""QLinearMatMul lowering: products take int8 and return int8."""

from __future__ import annotations

from qinvert.export.integer import IntegerLowering
from qinvert.export.lowering import Value
from qinvert.plan import Requantize
from qinvert.steps import MatMul


class QLinearLowering(IntegerLowering):
    """As `IntegerLowering`, with one node for a product that one factor requantizes."""

    def matmul(
        self, step: MatMul, left: Value, right: Value, add: list[Value], subtract: list[Value]
    ) -> Value:
        if self.plan.requantize is not Requantize.MULTIPLIER:
            # QLinearMatMul rounds by one factor: another rounding than the plan's.
            return super().matmul(step, left, right, add, subtract)
        operands = zip(self.widened(step, left, right), (step.left, step.right), strict=True)
        inputs: list[str] = []
        for operand, tensor in operands:
            inputs += [operand, self.scale_of(self.grid(tensor)), self.zero_point()]
        inputs += [self.scale_of(self.grid(step.output)), self.zero_point()]
        output, shape = self.stored(step.output), self.shape(step.output)
        self.graph.node("QLinearMatMul", inputs, output, shape, "int8")
        return self.value(step.output)
