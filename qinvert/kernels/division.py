"""How many residual steps a kernel's division by a scale needs to round to the right integer."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np

from qinvert.formats import INT8
from qinvert.numerics import scales

#: Neighbours of every tie that are tried on either side, in float32 steps.
NEIGHBOURS: Final = 4


@lru_cache(maxsize=65536)
def residual_steps(scale: float) -> int:
    """Smallest n for which n residual steps give ``round_half_even(float32(x / scale))`` for every x.

    With ``r = float32(1 / scale)`` the kernel starts from ``q = float32(x r)``,
    within 2 float32 steps of the quotient, and one step is ``q <- fma(fma(-q,
    scale, x), r, q)``.  Two steps give the correctly rounded quotient itself.
    A power of two needs no step.  After one step, q is within one float32 step of
    the quotient, so that the integer can be wrong only next to a tie.  Therefore
    every tie of int8 is tried with its neighbours.
    """
    if scales.is_power_of_two(scale):
        return 0
    return 1 if _is_right_after_one_step(np.float32(scale)) else 2


def _is_right_after_one_step(scale: np.float32) -> bool:
    ties = np.arange(INT8.magnitude, dtype=np.float32) + np.float32(0.5)
    near = (ties * scale)[:, None].view(np.int32) + np.arange(-NEIGHBOURS, NEIGHBOURS + 1, dtype=np.int32)
    x = near.view(np.float32)
    reciprocal = np.float32(1) / scale
    quotient = x * reciprocal
    # The product has 48 bits, and the difference cancels all but 26: float64 holds both.
    residual = (x.astype(np.float64) - quotient.astype(np.float64) * scale).astype(np.float32)
    refined = quotient + residual.astype(np.float64) * reciprocal
    rounded = refined.astype(np.float32)
    # float64 has already rounded the sum, which could decide next to a tie of float32.
    undecided = np.abs(refined - rounded) * 2 >= np.spacing(rounded) * (1 - 2.0**-24)
    right = np.rint(rounded) == np.rint(x / scale)
    return bool((right & ~undecided).all())
