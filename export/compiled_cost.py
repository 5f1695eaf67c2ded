"""What plans cost by a chip's compiler, for `qinvert.calibrate` to decide by."""

from __future__ import annotations

import math

from qinvert.calibration.planning.costs import Compiled, Measure
from qinvert.errors import ExportError, lookup
from qinvert.export.exporting import build, serialize
from qinvert.export.interface import GraphInput, GraphOutput, InputType, Options
from qinvert.export.runtimes import estimate, estimators, installed
from qinvert.hardware import chain_counts
from qinvert.plan.plan import LayerPlan, Plan


def compiled_cost(hardware: str) -> Measure:
    """Return a function that compiles a plan for a chip and says how many cycles one call takes.

    Pass it as ``measure`` to `qinvert.calibrate`: the best few candidates are
    then compiled, between integer ends, whole and in chains, and the one with
    the fewest cycles is taken.

    Parameters
    ----------
    hardware : str
        A chip that an installed compiler knows, such as ``"hexagon-v81"``.

    Raises
    ------
    ExportError
        If no compiler knows the chip, or it is not installed.
    """
    runtime = lookup(estimators(), hardware, "hardware", ExportError)
    if runtime.name not in installed():
        raise ExportError(
            f"the compiler for {hardware} is not installed; run: pip install {runtime.requirement}, or leave "
            "out --measure-cost and decide by the table of costs"
        )

    def compile_plan(layer: LayerPlan, target: str, batch: int) -> Compiled:
        plan = Plan(layers={"layer": layer}, target=target)
        each = {chains: _cycles(plan, hardware, batch, chains) for chains in chain_counts(batch)}
        chains = min(each, key=lambda count: each[count])
        return Compiled(cost=each[chains], chains=chains)

    return compile_plan


def _cycles(plan: Plan, hardware: str, batch: int, chains: int) -> float:
    """Return the cycles of one graph, infinite if the compiler refuses it."""
    options: Options = {
        "batch": batch,
        "chains": chains,
        "input": GraphInput.M,
        "input_type": InputType.INTEGERS,
        "output": GraphOutput.INTEGERS,
    }
    try:
        model = build(plan, **options)
        return estimate(serialize(model), hardware).cycles
    except ExportError:
        return math.inf
