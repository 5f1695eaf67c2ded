"""Where an elementwise product of two grids leaves int32 in kernels that round before they saturate.

Such a kernel computes ``y = int32(round((a - z_a) (b - z_b) (s_a s_b / s_y)))``
and saturates afterwards.  What lies beyond int32 becomes its smallest number,
so that a result far above the grid ends at the grid's lower end: onnxruntime's
QLinearMul is then wrong by the whole grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final

from qinvert.numerics.accumulators import INT32_LIMIT
from qinvert.numerics.folded_sums import ZERO_POINT

#: Largest ``s_a s_b / s_y``.  Two stored integers multiply to 2^14 at most; the factor of two
#: covers the rounding of the quotient and the zero point of the result.
MAX_RATIO: Final = INT32_LIMIT / (2 * ZERO_POINT**2)


def leaves_int32(scales: Sequence[float], result: float) -> bool:
    """Whether ``128^2 s_a s_b / s_y`` comes near 2^31, the end of int32.

    Parameters
    ----------
    scales : sequence of float
        Of the two 8-bit operands.
    result : float
        Scale of the 8-bit result.
    """
    return prod(scales) / result > MAX_RATIO
