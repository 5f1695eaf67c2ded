"""Programs as text: the formula of a step, and the table of all steps."""

from __future__ import annotations

from qinvert.program.cost import multiply_accumulates, program_cost
from qinvert.program.ports import BETA, MATRIX, Meaning, Port
from qinvert.program.step_list import StepList
from qinvert.program.steps import Axis, MatMul, Rescale, Scale, Step


def step_formula(step: Step) -> str:
    """Return the right-hand side of a step, such as ``S @ Y + Y``."""
    if isinstance(step, MatMul):
        plus = "".join(f" + {name}" for name in step.add)
        minus = "".join(f" - {name}" for name in step.subtract)
        return f"{step.left} @ {step.right}{plus}{minus}"
    if isinstance(step, Scale):
        factor = f"diag({step.vector})"
        return f"{factor} @ {step.source}" if step.axis == Axis.ROWS else f"{step.source} @ {factor}"
    if isinstance(step, Rescale) and step.factor != 1:
        return f"rescale({step.factor:g} * {step.source})"
    return f"{type(step).__name__.lower()}({', '.join(step.inputs)})"


def step_table(program: StepList) -> str:
    """Return the title, one line per step (shape, formula, cost), and the total."""
    rows = [("tensor", "shape", "multiply-accumulates", "formula")]
    for step in program.steps:
        macs = multiply_accumulates(program, step)
        shape = str(program.shapes[step.output])
        rows.append((step.output, shape, f"{macs:,}" if macs else "-", _shorten(step_formula(step))))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [program.title]
    lines += [
        f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {macs:>{widths[2]}}  {formula}"
        for name, shape, macs, formula in rows
    ]
    results = [_result(port) for port in program.outputs]
    return "\n".join([*lines, f"{', '.join(results)}: {program_cost(program)}"])


def _result(port: Port) -> str:
    """What an output is in terms of the tensor that holds it."""
    match port.meaning:
        case Meaning.FACTORED_INVERSE:
            return f"T = I + diag({BETA}) @ {port.tensor}, {MATRIX} stands for -L / {BETA}"
        case Meaning.STRICT_INVERSE:
            return f"T = I + {port.tensor}"
        case _:
            return f"{port.name} = {port.tensor}"


def _shorten(formula: str, limit: int = 72) -> str:
    return formula if len(formula) <= limit else f"{formula[: limit - 4]} ..."
