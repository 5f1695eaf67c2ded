"""What is exact on torch tensors: planes of integers, and products of integers.

Values wider than int8 enter int8 products as planes; those that must first be
rounded are split by `qinvert.numerics.rounding.operand_planes`.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from qinvert.formats import PLANE_RATIO, IntFormat
from qinvert.numerics.accumulators import BFLOAT16_EXACT, FLOAT32_EXACT, accumulator_limit, check_accumulator

#: A float32 value, or a tensor of them that broadcasts.
Scale = TypeVar("Scale", float, torch.Tensor)


def planes(q: torch.Tensor, scale: Scale, fmt: IntFormat) -> list[tuple[torch.Tensor, Scale]]:
    """Return (integers, scale) of every plane, high first: the value is ``sum_i integers_i * scale_i``."""
    if fmt.planes == 1:
        return [(q - fmt.zero_point if fmt.zero_point else q, scale)]
    high = torch.floor((q + PLANE_RATIO // 2) / PLANE_RATIO)
    return [(high, PLANE_RATIO * scale), (q - PLANE_RATIO * high, scale)]


def at_ends(q: torch.Tensor, fmt: IntFormat) -> torch.Tensor:
    """Where integers lie on the ends of their format: what saturated lies there. Nowhere in float32."""
    if fmt.is_float:
        return torch.zeros_like(q, dtype=torch.bool)
    return (q <= fmt.minimum) | (q >= fmt.maximum)


def dot_scalar(left: list[int], right: list[int]) -> int:
    """``sum_k left[k] * right[k]`` in Python integers, which never overflow."""
    return sum(a * b for a, b in zip(left, right, strict=True))


def integer_multiply(left: torch.Tensor, right: torch.Tensor, bound: int) -> torch.Tensor:
    """Exact elementwise ``left * right`` of integer-valued float32 tensors, in float64 where float32 rounds.

    ``bound`` is the largest magnitude that the product can reach, proved by the plan.
    """
    if bound < FLOAT32_EXACT:
        return left * right
    return left.to(torch.float64) * right.to(torch.float64)


def integer_matmul(left: torch.Tensor, right: torch.Tensor, bound: int, magnitude: int = 128) -> torch.Tensor:
    """Exact ``left @ right`` of integer-valued tensors.

    Parameters
    ----------
    left, right : torch.Tensor
        Integer-valued float32, shapes ``(..., m, k)`` and ``(..., k, n)``.
    bound : int
        Largest magnitude that the accumulator can reach, proved by the plan.
    magnitude : int
        Largest magnitude of an operand's value; int8's by default.

    Returns
    -------
    torch.Tensor
        Integer-valued float32 if ``bound < 2**24`` (every partial sum is then
        exact, in any order and with any fused kernel) and ``magnitude <= 256``
        (operands are then also exact as TF32 and bfloat16, to which torch
        may convert them), else float64.

    Raises
    ------
    PlanError
        If ``bound`` does not fit the accumulator, see `accumulator_limit`.
    """
    check_accumulator(bound, accumulator_limit(magnitude))
    if bound < FLOAT32_EXACT and magnitude <= BFLOAT16_EXACT:
        return left @ right
    return left.to(torch.float64) @ right.to(torch.float64)
