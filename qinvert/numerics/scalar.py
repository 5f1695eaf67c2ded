"""Scalar twins of the rounding primitives: Python integers and `numpy.float32`, written to be read."""

from __future__ import annotations

import math

import numpy as np

from qinvert.errors import InputError
from qinvert.formats import INT8, INT8X2, PLANE_RATIO, IntFormat
from qinvert.numerics.accumulators import partial_factors


def quantize_scalar(x: float, scale: float, fmt: IntFormat) -> int:
    """``sat(round_half_even(x / scale) + zero_point)`` of one number.

    The division is a true float32 division, as in ONNX QuantizeLinear.  Two
    planes are rounded one after the other: ``high`` on the scale
    ``PLANE_RATIO * scale``, then ``low`` from the float32 rest
    ``x - high * PLANE_RATIO * scale``.

    Raises
    ------
    InputError
        If ``x`` is NaN, for which there is no integer.
    """
    if math.isnan(x):
        raise InputError("cannot quantize NaN; look for the NaN upstream of the inverse")
    if fmt.planes == 1:
        return _round_scalar(np.float32(x), scale, fmt)
    high_scale = np.float32(PLANE_RATIO * scale)
    high = _round_scalar(np.float32(x), float(high_scale), INT8)
    low = _round_scalar(np.float32(x) - np.float32(high) * high_scale, scale, INT8)
    return PLANE_RATIO * high + low


def _round_scalar(x: np.float32, scale: float, fmt: IntFormat) -> int:
    with np.errstate(over="ignore"):
        return _saturate_scalar(float(x / np.float32(scale)), fmt)


def _saturate_scalar(steps: float, fmt: IntFormat) -> int:
    if math.isinf(steps):
        return fmt.maximum if steps > 0 else fmt.minimum
    # Python's round is exact on floats and rounds half to even.
    return max(fmt.minimum, min(fmt.maximum, round(steps) + fmt.zero_point))


def dequantize_scalar(q: int, scale: float, fmt: IntFormat) -> float:
    """Scalar twin of `dequantize`."""
    parts = [np.float32(p) * np.float32(s) for p, s in planes_scalar(q, scale, fmt)]
    return float(sum(parts[1:], parts[0]))


def quantize_exponential_scalar(x: float, scale: float, fmt: IntFormat) -> int:
    """Scalar twin of `qinvert.numerics.rounding.quantize_exponential`."""
    return quantize_scalar(float(np.float32(math.exp(x))), scale, fmt)


def requantize_divide_scalar(
    accumulator: int, unit: float, addends: list[tuple[int, float]], scale: float, fmt: IntFormat
) -> int:
    """Scalar twin of `requantize_divide`; ``addends`` are (integer, signed scale) pairs."""
    with np.errstate(over="ignore"):
        x = np.float32(accumulator) * np.float32(unit)
        for q, addend_scale in addends:
            x = x + np.float32(q) * np.float32(addend_scale)
    return quantize_scalar(float(x), scale, fmt)


def requantize_scaled_scalar(q: int, unit: float, factor: float, scale: float, fmt: IntFormat) -> int:
    """Scalar twin of `requantize_scaled`."""
    with np.errstate(over="ignore", under="ignore"):
        x = np.float32(q) * np.float32(unit) * np.float32(factor)
    return quantize_scalar(float(x), scale, fmt)


def requantize_partial_scalar(accumulators: list[int], factor: float, scale: float, fmt: IntFormat) -> int:
    """Scalar twin of `requantize_partial`."""
    first, *rest = (
        requantize_multiplier_scalar(accumulator, weighted, fmt)
        for accumulator, weighted in zip(
            accumulators, partial_factors(factor, len(accumulators)), strict=True
        )
    )
    return requantize_divide_scalar(first, scale, [(q, scale) for q in rest], scale, fmt) if rest else first


def requantize_multiplier_scalar(accumulator: int, factor: float, fmt: IntFormat) -> int:
    """Scalar twin of `requantize_multiplier`."""
    with np.errstate(over="ignore"):
        return _saturate_scalar(float(np.float32(accumulator) * np.float32(factor)), fmt)


def planes_scalar(q: int, scale: float, fmt: IntFormat) -> list[tuple[int, float]]:
    """Scalar twin of `planes`."""
    if fmt.planes == 1:
        return [(q - fmt.zero_point, scale)]
    low = (q + PLANE_RATIO // 2) % PLANE_RATIO - PLANE_RATIO // 2
    return [((q - low) // PLANE_RATIO, PLANE_RATIO * scale), (low, scale)]


def operand_planes_scalar(q: int, scale: float, fmt: IntFormat) -> list[tuple[int, float]]:
    """Scalar twin of `qinvert.numerics.rounding.operand_planes`."""
    if fmt.is_split:
        q, fmt = quantize_scalar(dequantize_scalar(q, scale, fmt), scale, INT8X2), INT8X2
    return planes_scalar(q, scale, fmt)
