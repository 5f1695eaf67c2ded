"""Scales: which float32 numbers are legal, and products and quotients of them.

Python's floats are float64.  One operation on float32 numbers in float64,
rounded to float32 afterwards, is the float32 operation: a product of two
24-bit mantissas is exact in 53 bits, and a quotient that is rounded twice
is the same as if it were rounded once, because 53 >= 2 * 24 + 2.  So building a
program needs no array library.
"""

from __future__ import annotations

import ctypes
import math
from typing import Final

from qinvert.errors import PlanError

#: A product with a scale below this comes near the smallest normal float32.
MIN_SCALE: Final = 1e-30
#: Two scales above this, times an accumulator, come near the largest float32.
MAX_SCALE: Final = 1e15


def float32(value: float) -> float:
    """Return ``value`` rounded to the nearest float32, infinity beyond the largest, as a Python float."""
    return ctypes.c_float(value).value


def check_scale(scale: float) -> None:
    """Refuse a scale that is not a float32 in [`MIN_SCALE`, `MAX_SCALE`].

    Inside that interval no product of two scales and an accumulator overflows.

    Raises
    ------
    PlanError
        With the value and the legal range.
    """
    legal = isinstance(scale, (int, float)) and MIN_SCALE <= scale <= MAX_SCALE
    if not legal or float32(scale) != scale:
        raise PlanError(
            f"scale {scale!r} is not a float32 in [{MIN_SCALE:g}, {MAX_SCALE:g}]; calibrate again"
        )


def is_power_of_two(value: float) -> bool:
    """Whether ``|value|`` is a power of two: multiplying by it is exact."""
    return math.frexp(value)[0] in (0.5, -0.5)


def product_scale(left: float, right: float) -> float:
    """``float32(left * right)``: the real value of one accumulator step."""
    return float32(float32(left) * float32(right))


def multiplier(left: float, right: float, output: float) -> float:
    """``float32(float32(left * right) / output)``, the factor that QLinearMatMul applies.

    Raises
    ------
    PlanError
        If it overflows, because zero times infinity would be NaN.
    """
    factor = float32(product_scale(left, right) / float32(output))
    if math.isinf(factor):
        raise PlanError(
            f"scales {left:.3g} * {right:.3g} / {output:.3g} overflow float32; "
            "use a larger scale for the product"
        )
    return factor
