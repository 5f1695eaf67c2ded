"""Runs a `LayerPlan` in exact integer arithmetic.

Values are integer-valued float32 tensors (see `qinvert.numerics.rounding`), so the
same code runs batched on a CPU or a CUDA device and gives the same bits on
both: products and accumulators are exact integers whatever the kernel, and
the few float32 operations around them are IEEE operations, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qinvert.execution.hexagon import HexagonEvaluator, check_plan
from qinvert.execution.inputs import assemble, program_inputs
from qinvert.execution.integers import IntegerEvaluator
from qinvert.numerics import hexagon
from qinvert.numerics.law import Rounding
from qinvert.numerics.rounding import dequantize, quantize
from qinvert.plan.plan import LayerPlan
from qinvert.program.steps import INPUT

Observer = Callable[[str, torch.Tensor], None]


def simulate_batched(
    plan: LayerPlan,
    lower: torch.Tensor,
    observe: Observer | None = None,
    beta: torch.Tensor | None = None,
    rounding: Rounding = Rounding.ONNX,
) -> torch.Tensor:
    """`simulate_inverse` by one torch operation a step, over all matrices at once."""
    result = simulate_integers(plan, lower, observe, beta, rounding)
    values = dequantize(result, plan.output.scale, plan.output.format)
    return assemble(plan.program, values, beta)


def simulate_integers(
    plan: LayerPlan,
    lower: torch.Tensor,
    observe: Observer | None = None,
    beta: torch.Tensor | None = None,
    rounding: Rounding = Rounding.ONNX,
) -> torch.Tensor:
    """Integers of the program's output for checked tensors, as integer-valued float32.

    ``observe(name, integers)`` receives the inputs and every step's output.
    """
    evaluate, onto_grid = IntegerEvaluator, quantize
    if rounding is Rounding.HEXAGON:
        check_plan(plan)
        evaluate, onto_grid = HexagonEvaluator, hexagon.quantize
    inputs = {
        name: onto_grid(value, plan.tensors[name].scale, plan.tensors[name].format)
        for name, value in program_inputs(plan.program, lower, beta, torch.float32).items()
    }
    source = inputs.pop(INPUT)
    evaluator = evaluate(plan, source.shape[0], source.device)
    # Autocast would run the products of the float32 integers in 16-bit accumulators.
    with torch.autocast(source.device.type, enabled=False):
        return plan.program.evaluate(evaluator, source, observe, inputs).reshape(lower.shape)
