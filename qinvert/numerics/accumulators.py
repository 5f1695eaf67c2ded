"""Planes of operands, and accumulators of their products: how many there are, and how large they can be."""

from __future__ import annotations

from typing import Final

from qinvert.errors import PlanError
from qinvert.formats import INT8, PLANE_RATIO, IntFormat

#: Integers up to this magnitude are exact in float32, in every summation order.
FLOAT32_EXACT: Final = 2**24
#: Integers up to this magnitude are exact in bfloat16, and so in TF32.
BFLOAT16_EXACT: Final = 2**8
#: Accumulators of products with an operand of 8 bits are int32 on every target.
INT32_LIMIT: Final = 2**31
#: Accumulators of 16 by 16 bits: what a float64 holds exactly.
WIDE_LIMIT: Final = 2**53


def operand_magnitudes(fmt: IntFormat, right: bool) -> tuple[int, ...]:
    """Largest magnitude of every plane of an operand, high first."""
    split = fmt.planes == 2 or (right and fmt.is_split)
    return (INT8.magnitude, INT8.magnitude) if split else (fmt.magnitude,)


def plane_scales(fmt: IntFormat, scale: float, right: bool) -> tuple[float, ...]:
    """Real value of one step of every plane of an operand, high first."""
    return (PLANE_RATIO * scale, scale) if len(operand_magnitudes(fmt, right)) > 1 else (scale,)


def partial_products(left_planes: int, right_planes: int) -> list[list[tuple[int, int]]]:
    """Return the plane pairs of a product, grouped by weight, heaviest first.

    Pairs of one group share an accumulator.  If both operands have two
    planes, the product of the low ones is dropped: it stays below one step of a
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


def accumulator_limit(magnitude: int) -> int:
    """Return what an accumulator of products stays below, by the magnitude of the narrower operand.

    Targets that multiply 16 by 16 bits have accumulators wider than int32.
    """
    return INT32_LIMIT if magnitude <= INT8.magnitude else WIDE_LIMIT


def check_accumulator(bound: int, limit: int = INT32_LIMIT) -> None:
    """Refuse an accumulator that can reach ``limit``.

    Raises
    ------
    PlanError
        With the bound and the remedy.
    """
    if bound >= limit:
        raise PlanError(
            f"an accumulator can reach {bound}, but this target's hold less than {limit}; "
            "use a narrower format or a larger scale"
        )
