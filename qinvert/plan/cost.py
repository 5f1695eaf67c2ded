"""What a plan costs: the work for one matrix, counted from its steps and formats."""

from __future__ import annotations

import math
from typing import Final

from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.cost import multiply_accumulates
from qinvert.program.steps import MatMul

#: Number of int8 multiply-accumulates that take as long as moving one byte through memory.
BYTE_COST: Final = 10
#: Number of them that take as long as the overhead of one step, divided among 64 matrices.
NODE_COST: Final = 600


def plan_cost(plan: QuantizedProgram) -> int:
    """Return the work for one matrix under a plan, in int8 multiply-accumulates.

    ``sum of partial products + BYTE_COST * bytes moved + NODE_COST * steps``:
    an int8x2 product counts as three int8 products, and an int16 product counts
    as four.  The weights are those of a CPU on a batch of 64; only the ratios
    between plans matter.
    """
    program, total = plan.program, 0
    for step in program.steps:
        total += NODE_COST + BYTE_COST * sum(
            math.prod(program.shapes[name]) * plan.tensors[name].format.bytes
            for name in (*step.inputs, step.output)
            if name in program.shapes
        )
        if isinstance(step, MatMul):
            total += multiply_accumulates(program, step) * plan.products[step.output].cost
    return total
