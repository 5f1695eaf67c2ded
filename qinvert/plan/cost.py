"""What a plan costs: work of one matrix, counted from its steps and formats."""

from __future__ import annotations

import math
from typing import Final

from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.cost import multiply_accumulates
from qinvert.program.steps import MatMul

#: int8 multiply-accumulates in the time that one byte takes through memory.
BYTE_COST: Final = 10
#: The same for the overhead of one step, divided among 64 matrices.
NODE_COST: Final = 600


def plan_cost(plan: QuantizedProgram) -> int:
    """Return the work of one matrix under a plan, in int8 multiply-accumulates.

    ``sum of partial products + BYTE_COST * bytes moved + NODE_COST * steps``:
    an int8x2 product counts as three int8 ones, an int16 one as four int8
    halves.  The weights are those of a CPU on a batch of 64; what counts are
    ratios between plans.
    """
    program, total = plan.program, 0
    for step in program.steps:
        total += NODE_COST + BYTE_COST * sum(
            math.prod(program.shapes[name]) * _bytes(plan, name)
            for name in (*step.inputs, step.output)
            if name in program.shapes
        )
        if isinstance(step, MatMul):
            total += multiply_accumulates(program, step) * plan.products[step.output].cost
    return total


def _bytes(plan: QuantizedProgram, name: str) -> int:
    fmt = plan.tensors[name].format
    return fmt.planes * fmt.container_bits // 8
