"""Runs a plan's integers where they run fastest: a fused kernel on CUDA, torch elsewhere."""

from __future__ import annotations

from typing import TypeVar, cast

import torch

from qinvert.execution.inputs import needed
from qinvert.execution.simulator import Observer, simulate_batched
from qinvert.matrices import like
from qinvert.numerics.exact import at_ends
from qinvert.numerics.law import Rounding
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.systems import Systems

M = TypeVar("M")


def inverse(plan: QuantizedProgram, lower: M, beta: object = None, rounding: str = "onnx") -> M:
    """``T = (I + L)^-1`` of matrices that are not checked yet; see `qinvert.LayerPlan.inverse`."""
    chosen = Rounding.named(rounding)
    factored = plan.program.inverse_ports.factored
    systems = Systems.checked(lower, beta if factored else None, chunk=plan.chunk)
    result = simulate_inverse(plan, needed(plan.program, systems), rounding=chosen)
    return cast("M", like(result, lower, beta))


def simulate_inverse(
    plan: QuantizedProgram,
    systems: Systems,
    observe: Observer | None = None,
    rounding: Rounding = Rounding.ONNX,
) -> torch.Tensor:
    """`inverse` of checked systems; float32 on L's device.

    On a CUDA device a fused kernel computes the same bits if there is one, see
    `qinvert.kernels.dispatch.fused_inverse`.  With ``observe`` no kernel runs,
    because kernels do not store every tensor.

    Raises
    ------
    InputError
        If L holds a NaN.
    PlanError
        If that rounding is not known for the plan.
    """
    if systems.lower.is_cuda and observe is None and rounding is Rounding.ONNX:
        from qinvert.kernels.dispatch import fused_inverse

        if (found := fused_inverse(plan, systems.lower)) is not None:
            return found[0]
    return simulate_batched(plan, systems, observe, rounding)


def simulate_counting(
    plan: QuantizedProgram, systems: Systems, rounding: Rounding = Rounding.ONNX
) -> tuple[torch.Tensor, dict[str, int]]:
    """`simulate_inverse`, and the number of values on the ends of its grid for each tensor that has any.

    Partial tensors are left out: what saturates there changes no result.
    """
    if systems.lower.is_cuda and rounding is Rounding.ONNX:
        from qinvert.kernels.dispatch import fused_inverse

        if (found := fused_inverse(plan, systems.lower, count=True)) is not None:
            return found
    counts: dict[str, int] = {}
    partial = plan.program.partial_tensors

    def count(name: str, integers: torch.Tensor) -> None:
        if name in partial:
            return
        number = int(at_ends(integers, plan.tensors[name].format).sum())
        if number:
            counts[name] = number

    return simulate_batched(plan, systems, count, rounding), counts
