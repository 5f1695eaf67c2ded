"""What is exact: planes of integers, and the accumulators that sum their products.

Values wider than int8 enter int8 products as planes; those that must be
rounded for it are split by `arithmetic.operand_planes`.
"""

from __future__ import annotations

from typing import Final

import torch

from qinvert.errors import PlanError
from qinvert.formats import INT8, PLANE_RATIO, IntFormat

#: Integers up to this magnitude are exact in float32, in every summation order.
FLOAT32_EXACT: Final = 2**24
#: Integers up to this magnitude are exact in bfloat16, and so in TF32.
BFLOAT16_EXACT: Final = 2**8
#: Accumulators of every target are int32.
INT32_LIMIT: Final = 2**31


def planes(q: torch.Tensor, scale: float, fmt: IntFormat) -> list[tuple[torch.Tensor, float]]:
    """Return (integers, scale) of every plane, high first: the value is ``sum_i integers_i * scale_i``."""
    if fmt.planes == 1:
        return [(q - fmt.zero_point if fmt.zero_point else q, scale)]
    high = torch.floor((q + PLANE_RATIO // 2) / PLANE_RATIO)
    return [(high, PLANE_RATIO * scale), (q - PLANE_RATIO * high, scale)]


def operand_magnitudes(fmt: IntFormat, right: bool) -> tuple[int, ...]:
    """Largest magnitude of every plane of an operand, high first."""
    split = fmt.planes == 2 or (right and fmt.container_bits > INT8.container_bits)
    return (INT8.magnitude, INT8.magnitude) if split else (fmt.magnitude,)


def partial_products(left_planes: int, right_planes: int) -> list[list[tuple[int, int]]]:
    """Return the plane pairs of a product, grouped by weight, heaviest first.

    Pairs of one group share an accumulator.  Of two operands with two planes
    the product of the low ones is dropped: it stays below one step of a
    16-bit result.
    """
    groups: dict[int, list[tuple[int, int]]] = {}
    for i in range(left_planes):
        for j in range(right_planes):
            groups.setdefault(i + j, []).append((i, j))
    return [groups[weight] for weight in sorted(groups) if weight < 2]


def partial_factors(factor: float, planes: int) -> list[float]:
    """Factors of the accumulators of a right operand's planes, high first; exact in float32."""
    return [factor * PLANE_RATIO**i for i in reversed(range(planes))]


def check_accumulator(bound: int) -> None:
    """Refuse an accumulator that can reach ``2**31``.

    Raises
    ------
    PlanError
        With the bound and the remedy.
    """
    if bound >= INT32_LIMIT:
        raise PlanError(
            f"an accumulator can reach {bound}, an int32 holds less than {INT32_LIMIT}; "
            "use a narrower format or a larger scale"
        )


def dot_scalar(left: list[int], right: list[int]) -> int:
    """``sum_k left[k] * right[k]`` in Python integers, which never wrap."""
    return sum(a * b for a, b in zip(left, right, strict=True))


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
        (operands are then exact as TF32 and bfloat16, too, which torch may
        convert them to), else float64.

    Raises
    ------
    PlanError
        If ``bound`` does not fit an int32 accumulator.
    """
    check_accumulator(bound)
    if bound < FLOAT32_EXACT and magnitude <= BFLOAT16_EXACT:
        return left @ right
    return left.to(torch.float64) @ right.to(torch.float64)
