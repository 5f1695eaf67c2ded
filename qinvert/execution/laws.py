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
from qinvert.numerics.law import Rounding
from qinvert.numerics.rounding import quantize
from qinvert.plan.quantized_program import QuantizedProgram


def _check_nothing(plan: QuantizedProgram) -> None:
    """ONNX defines every plan."""


def _takes_any_ends(_: QuantizedProgram) -> bool:
    """Floats go in and out as they are in ONNX."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """What computes the integers of a plan."""

    evaluator: type[IntegerEvaluator]
    #: Puts the float inputs on their grids.
    quantize: Callable[[torch.Tensor, float, IntFormat], torch.Tensor] = quantize
    #: Raises PlanError for a plan for which the law is not known.
    check: Callable[[QuantizedProgram], None] = _check_nothing
    #: Whether a graph of the plan follows the law only where integers go in and out.
    needs_integer_ends: Callable[[QuantizedProgram], bool] = _takes_any_ends


LAWS = {
    Rounding.ONNX: Law(evaluator=IntegerEvaluator),
    Rounding.HEXAGON: Law(
        evaluator=HexagonEvaluator,
        quantize=hexagon.quantize,
        check=hexagon.check_plan,
        needs_integer_ends=hexagon.needs_integer_ends,
    ),
    # Floats are quantized by the host, as ONNX says.
    Rounding.TFLITE: Law(evaluator=TfliteEvaluator, check=tflite.check_plan),
}
