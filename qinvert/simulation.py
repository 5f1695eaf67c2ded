"""Runs a plan's integers where they run fastest: a fused kernel on CUDA, torch elsewhere."""

from __future__ import annotations

import torch

from qinvert.execution.simulator import Observer, simulate_batched
from qinvert.numerics.law import Rounding
from qinvert.plan.plan import LayerPlan


def simulate_inverse(
    plan: LayerPlan,
    lower: torch.Tensor,
    observe: Observer | None = None,
    beta: torch.Tensor | None = None,
    rounding: Rounding = Rounding.ONNX,
) -> torch.Tensor:
    """`LayerPlan.inverse` of checked tensors; float32 on L's device.

    On a CUDA device a fused kernel computes the same bits where there is one,
    see `qinvert.kernels.solve_tril`; ``observe`` needs every tensor, which a
    kernel never stores.

    Raises
    ------
    InputError
        If ``lower`` holds a NaN.
    PlanError
        If that rounding is not known of the plan.
    """
    if lower.is_cuda and observe is None and rounding is Rounding.ONNX:
        from qinvert.kernels.dispatch import fused_inverse

        if (found := fused_inverse(plan, lower)) is not None:
            return found[0]
    return simulate_batched(plan, lower, observe, beta, rounding)


def simulate_counting(
    plan: LayerPlan,
    lower: torch.Tensor,
    beta: torch.Tensor | None = None,
    rounding: Rounding = Rounding.ONNX,
) -> tuple[torch.Tensor, dict[str, int]]:
    """`simulate_inverse`, and how many values of each tensor stand on the ends of its grid, if any."""
    if lower.is_cuda and rounding is Rounding.ONNX:
        from qinvert.kernels.dispatch import fused_inverse

        if (found := fused_inverse(plan, lower, count=True)) is not None:
            return found
    counts: dict[str, int] = {}

    def count(name: str, integers: torch.Tensor) -> None:
        fmt = plan.tensors[name].format
        number = int(((integers <= fmt.minimum) | (integers >= fmt.maximum)).sum())
        if number:
            counts[name] = number

    return simulate_batched(plan, lower, count, beta, rounding), counts
