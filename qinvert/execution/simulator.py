"""Runs a plan's program in exact integer arithmetic.

Values are integer-valued float32 tensors (see `qinvert.numerics.rounding`), so
the same code runs batched on a CPU or a CUDA device and gives the same bits on
both: products and accumulators are exact integers in every kernel, and
the few float32 operations around them are IEEE operations, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch

from qinvert.execution.inputs import assemble, fold, only, program_inputs, unfold
from qinvert.execution.laws import LAWS
from qinvert.numerics.law import Rounding
from qinvert.numerics.rounding import dequantize
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.systems import Systems

#: Receives a tensor's name and its integers.
Observer: TypeAlias = Callable[[str, torch.Tensor], None]


def execute(plan: QuantizedProgram, inputs: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Every output of a plan's program, for any ports, bit for bit as in ONNX.

    Parameters
    ----------
    plan : QuantizedProgram
    inputs : mapping
        A tensor or array ``(..., rows, columns)`` for every input port, all
        with the same axes in front; quantized from float32.

    Returns
    -------
    dict
        float32 ``(..., rows, columns)`` for every output port, dequantized.

    Raises
    ------
    InputError
        If an input is not legal.
    """
    values, front = fold(plan.program, inputs, torch.float32)
    outputs = evaluate(plan, values)
    reals = {}
    for port in plan.program.outputs:
        grid = plan.tensors[port.tensor]
        reals[port.name] = dequantize(outputs[port.name], grid.scale, grid.format)
    return unfold(reals, front, inputs)


def simulate_batched(
    plan: QuantizedProgram,
    systems: Systems,
    observe: Observer | None = None,
    rounding: Rounding = Rounding.ONNX,
) -> torch.Tensor:
    """`qinvert.simulation.simulate_inverse` by one torch operation per step, over all matrices at once."""
    result = simulate_integers(plan, systems, observe, rounding)
    values = dequantize(result, plan.output.scale, plan.output.format)
    return assemble(plan.program, values, systems)


def simulate_integers(
    plan: QuantizedProgram,
    systems: Systems,
    observe: Observer | None = None,
    rounding: Rounding = Rounding.ONNX,
) -> torch.Tensor:
    """Integers of the result of an inverse for checked systems, as integer-valued float32.

    ``observe(name, integers)`` receives the inputs and every step's output.
    """
    inputs = program_inputs(plan.program, systems, torch.float32)
    return only(evaluate(plan, inputs, observe, rounding)).reshape(systems.lower.shape)


def evaluate(
    plan: QuantizedProgram,
    inputs: Mapping[str, torch.Tensor],
    observe: Observer | None = None,
    rounding: Rounding = Rounding.ONNX,
) -> dict[str, torch.Tensor]:
    """Integers of every output ``[batch, rows, columns]`` from real inputs of the same form.

    Raises
    ------
    PlanError
        If that rounding is not known for the plan.
    """
    law = LAWS[rounding]
    law.check(plan)
    integers = {
        name: law.quantize(value, plan.tensors[name].scale, plan.tensors[name].format)
        for name, value in inputs.items()
    }
    first = next(iter(integers.values()))
    # Autocast would compute the products of the float32 integers in 16 bits.
    with torch.autocast(first.device.type, enabled=False):
        return plan.program.evaluate(law.evaluator(plan, first.shape[0], first.device), integers, observe)
