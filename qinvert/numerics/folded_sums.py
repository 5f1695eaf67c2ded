"""What a sum of two grids loses in kernels that fold the zero points into one float32 offset.

Such a kernel computes ``y = a (s_a / s_y) + b (s_b / s_y) + offset`` with the
stored integers a and b, and ``offset = z_y - z_a s_a / s_y - z_b s_b / s_y``
rounded to float32.  Where a scale ratio is 4e6, the offset has steps of 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from qinvert.formats import UINT8
from qinvert.numerics.accumulators import FLOAT32_EXACT
from qinvert.numerics.scales import is_power_of_two

#: Largest loss in steps of the result, for scale ratios of 31 to 1.  Where a value lies closer to a
#: rounding boundary than this, it may fall on the other side: one value in 2,000 at most.
MAX_LOSS: Final = 2.0**-12
#: onnxruntime stores int8 as uint8 on x86, so that a zero point of 0 is no exception.
ZERO_POINT: Final = UINT8.zero_point


def folded_loss(scales: Sequence[float], result: float) -> float:
    """``128 (1 + sum_i s_i / s_y) 2^-24``: how far the offset may be off, in steps of the result.

    Exact powers of two lose nothing as long as float32 holds every partial sum.

    Parameters
    ----------
    scales : sequence of float
        Of the 8-bit operands.
    result : float
        Scale of the 8-bit result.
    """
    ratios = [1.0, *(scale / result for scale in scales)]
    exact = all(map(is_power_of_two, ratios)) and all(map(is_power_of_two, (*scales, result)))
    if exact and 2 * ZERO_POINT * sum(ratios) <= FLOAT32_EXACT * min(ratios):
        return 0.0
    return ZERO_POINT * sum(ratios) / FLOAT32_EXACT


def loses(scales: Sequence[float], result: float) -> bool:
    """Whether a kernel that folds zero points gives another sum than float32 operators, see `MAX_LOSS`."""
    return folded_loss(scales, result) > MAX_LOSS
