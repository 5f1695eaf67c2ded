"""The integer meaning of a plan, by whose rounding it follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qinvert.execution import hexagon, tflite
from qinvert.execution.hexagon import HexagonEvaluator
from qinvert.execution.integers import IntegerEvaluator
from qinvert.execution.tflite import TfliteEvaluator
from qinvert.formats import IntFormat
from qinvert.numerics import hexagon as hexagon_numbers
from qinvert.numerics.law import Rounding
from qinvert.numerics.rounding import quantize
from qinvert.plan.quantized_program import QuantizedProgram


def _check_nothing(plan: QuantizedProgram) -> None:
    """ONNX defines every plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """What computes the integers of a plan."""

    evaluator: type[IntegerEvaluator]
    #: Puts the float inputs on their grids.
    quantize: Callable[[torch.Tensor, float, IntFormat], torch.Tensor] = quantize
    #: Raises PlanError for a plan for which the law is not known.
    check: Callable[[QuantizedProgram], None] = _check_nothing


LAWS = {
    Rounding.ONNX: Law(evaluator=IntegerEvaluator),
    Rounding.HEXAGON: Law(
        evaluator=HexagonEvaluator, quantize=hexagon_numbers.quantize, check=hexagon.check_plan
    ),
    # Floats are quantized by the host, as ONNX says.
    Rounding.TFLITE: Law(evaluator=TfliteEvaluator, check=tflite.check_plan),
}
