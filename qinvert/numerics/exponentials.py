"""Whether the integers of an exponential depend on the library that computes it.

Libraries compute ``exp`` in float32 to within a few units in the last place, each
in its own way.  The result is rounded to a grid right after, so that two
libraries give different integers only where a value lies next to a rounding tie.
A source of at most 16 bits has so few values that all of them can be tried, and a
slightly larger scale moves every one of them away from its tie.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from qinvert.errors import PlanError
from qinvert.formats import IntFormat
from qinvert.numerics import rounding
from qinvert.numerics.scales import MAX_SCALE, check_scale

#: Units in the last place of float32 by which an exp may miss the exact value.
MAX_ULPS: Final = 4
#: Scales that `safe_scale` tries before it gives up.
MAX_TRIES: Final = 512


def near_ties(
    source: float, source_format: IntFormat, result: float, result_format: IntFormat, ulps: int = MAX_ULPS
) -> int:
    """Count the integers ``q <= 0`` of the source for which ``rhe(exp(s_q q) / s)`` depends on the library.

    Rounding is monotone.  So no library decides if ``exp`` minus and plus ``ulps``
    units in the last place end in the same integer of the result.

    Parameters
    ----------
    source, result : float
        Scales.
    source_format, result_format : IntFormat
    ulps : int
        By how many units in the last place of float32 libraries may be off.

    Returns
    -------
    int
        0 where every such library gives the same integers.

    Raises
    ------
    PlanError
        If a scale is not legal.
    """
    check_scale(source)
    check_scale(result)
    integers = torch.arange(source_format.minimum, 1, dtype=torch.float32)
    values = rounding.dequantize(integers, source, source_format)
    # exp(0) is 1 everywhere.
    values = values[values < 0]
    exact = torch.exp(values.to(torch.float64)).numpy().astype(np.float32)
    low, high = (
        rounding.quantize(torch.from_numpy(_moved(exact, by)), result, result_format) for by in (-ulps, ulps)
    )
    return int((low != high).sum())


def _moved(values: np.ndarray, ulps: int) -> np.ndarray:
    # The bits of positive floats are in the order of the floats.
    bits = np.maximum(values.view(np.int32) + np.int32(ulps), 0)
    moved: np.ndarray = bits.view(np.float32)
    return moved


def safe_scale(
    source: float, source_format: IntFormat, result: float, result_format: IntFormat, ulps: int = MAX_ULPS
) -> float:
    """Return the smallest float32 scale of the source, from ``source`` up, with no `near_ties`.

    A source of 16 bits and a result of 8 have one within a few dozen float32
    numbers.  A result of 16 bits has none: its ties are too close to one another.

    Raises
    ------
    PlanError
        If a scale is not legal, or none of `MAX_TRIES` numbers will do.
    """
    scale = source
    for _ in range(MAX_TRIES):
        if not near_ties(scale, source_format, result, result_format, ulps):
            return scale
        scale = _next(scale)
        if scale > MAX_SCALE:
            break
    raise PlanError(
        f"no scale of {source_format} near {source:.3g} keeps exp away from the ties of {result_format} "
        f"(scale {result:.3g}); use a result of 8 bits, or compare with a tolerance of one step"
    )


def _next(scale: float) -> float:
    return float(np.nextafter(np.float32(scale), np.float32(np.inf)))
