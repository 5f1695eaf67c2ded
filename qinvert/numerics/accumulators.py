"""Planes of operands, and accumulators of their products: how many there are, and how large they can be."""

from __future__ import annotations

from typing import Final

from qinvert.errors import PlanError
from qinvert.formats import INT8, PLANE_RATIO, IntFormat

#: Integers up to this magnitude are exact in float32, in every summation order.
FLOAT32_EXACT: Final = 2**24
#: Integers up to this magnitude are exact in bfloat16, and so in TF32.
BFLOAT16_EXACT: Final = 2**8
#: Accumulators of every target are int32.
INT32_LIMIT: Final = 2**31


def operand_magnitudes(fmt: IntFormat, right: bool) -> tuple[int, ...]:
    """Largest magnitude of every plane of an operand, high first."""
    split = fmt.planes == 2 or (right and fmt.container_bits > INT8.container_bits)
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


def check_accumulator(bound: int) -> None:
    """Refuse an accumulator that can reach ``2**31``.

    Raises
    ------
    PlanError
        With the bound and the remedy.
    """
    if bound >= INT32_LIMIT:
        raise PlanError(
            f"an accumulator can reach {bound}, but an int32 holds less than {INT32_LIMIT}; "
            "use a narrower format or a larger scale"
        )
