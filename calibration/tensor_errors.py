"""Errors of every tensor inside a program: how far the integers are from the same steps without rounding."""

from __future__ import annotations

import torch

from qinvert.execution.floating import run_systems
from qinvert.execution.inputs import needed
from qinvert.metrics import NoiseStatistics
from qinvert.numerics.rounding import dequantize
from qinvert.plan.plan import LayerPlan
from qinvert.simulation import simulate_inverse
from qinvert.systems import Systems


def tensor_errors(plan: LayerPlan, systems: Systems) -> dict[str, float]:
    """``20 log10(||x|| / ||x_hat - x||)`` of every tensor, dB, roundings of earlier steps included.

    x is that of the steps in float64, and x_hat what the integers mean.

    Parameters
    ----------
    plan : LayerPlan
        Plan of an inverse.
    systems : Systems
        Flat systems, with beta where the program takes it.
    """
    given = needed(plan.program, systems)
    exact: dict[str, torch.Tensor] = {}
    found: dict[str, float] = {}

    def compare(name: str, integers: torch.Tensor) -> None:
        grid, statistics = plan.tensors[name], NoiseStatistics()
        statistics.update(dequantize(integers, grid.scale, grid.format), exact[name])
        found[name] = statistics.sqnr_db

    run_systems(plan.program, given, torch.float64, exact.__setitem__)
    simulate_inverse(plan, given, compare)
    return found
