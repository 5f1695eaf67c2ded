"""How TFLite's reference kernels round int8 graphs, bit for bit: differently from ONNX.

Arm compares its Ethos-U NPUs with these kernels bit for bit (README of Vela);
no NPU was used here.  The laws are those of gemmlowp and of the kernels
BATCH_MATMUL, ADD and MUL; they were compared with ai-edge-litert 2.3 on
products with float and power-of-two scales and on all pairs of int8.
`qinvert.verify` compares every value of whole graphs with them.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

import torch

from qinvert.formats import IntFormat
from qinvert.numerics.scales import float32

#: Bits of a factor.
FACTOR_BITS: Final = 31
#: Bits by which the integers of a sum are shifted to the left before they are scaled.
SUM_BITS: Final = 20
#: Factors below this are taken for zero.
SMALLEST_EXPONENT: Final = -31


def factor_of(multiplier: float) -> tuple[int, int]:
    """Return ``(m, e)`` with ``multiplier = m 2^(e - 31)``, m rounded to an integer in [2^30, 2^31]."""
    mantissa, exponent = math.frexp(multiplier)
    if exponent < SMALLEST_EXPONENT:
        return 0, 0
    return math.floor(mantissa * 2.0**FACTOR_BITS + 0.5), exponent


def scaled_scalar(value: int, multiplier: float) -> int:
    """Scalar twin of `scaled`."""
    factor, exponent = factor_of(multiplier)
    product = Fraction(value * 2 ** max(exponent, 0) * factor, 2**FACTOR_BITS)
    high = math.floor(product + Fraction(1, 2))
    magnitude = math.floor(Fraction(abs(high), 2 ** max(-exponent, 0)) + Fraction(1, 2))
    return magnitude if high >= 0 else -magnitude


def scaled(value: torch.Tensor, multiplier: float) -> torch.Tensor:
    """``round_half_away(floor(value 2^max(e, 0) m / 2^31 + 1/2) / 2^max(-e, 0))``, int64.

    It rounds twice: to an integer, ties up, and that to a multiple of a power
    of two, ties away from zero.

    Parameters
    ----------
    value : torch.Tensor
        int64, of at most 31 bits.
    multiplier : float
        The factor that `factor_of` takes apart.
    """
    factor, exponent = factor_of(multiplier)
    shift, half = max(-exponent, 0), 1 << (FACTOR_BITS - 1)
    high = ((value << max(exponent, 0)) * factor + half) >> FACTOR_BITS
    magnitude = (high.abs() + ((1 << shift) >> 1)) >> shift
    return torch.where(high >= 0, magnitude, -magnitude)


def requantize_scalar(accumulator: int, unit: float, scale: float, fmt: IntFormat) -> int:
    """Scalar twin of `requantize`."""
    return _saturated_scalar(scaled_scalar(accumulator, unit / scale), fmt)


def requantize(accumulator: torch.Tensor, unit: float, scale: float, fmt: IntFormat) -> torch.Tensor:
    """``sat(scaled(accumulator, unit / scale))``, as integer-valued float32: BATCH_MATMUL.

    Parameters
    ----------
    accumulator : torch.Tensor
        Exact integers, float32 or float64, residual terms already added.
    unit : float
        ``float32(s_left s_right)``; it is divided by ``scale`` in float64.
    scale, fmt
        Grid of the result, with a format of one plane and 8 bits.
    """
    return _saturated(scaled(accumulator.to(torch.int64), unit / scale), fmt)


def multiply_scalar(product: int, unit: float, scale: float, fmt: IntFormat) -> int:
    """Scalar twin of `multiply`."""
    return _saturated_scalar(scaled_scalar(product, float32(unit / scale)), fmt)


def multiply(product: torch.Tensor, unit: float, scale: float, fmt: IntFormat) -> torch.Tensor:
    """``sat(scaled(product, float32(unit / scale)))``, as integer-valued float32: MUL.

    As `requantize`, but the quotient is a float32.
    """
    return _saturated(scaled(product.to(torch.int64), float32(unit / scale)), fmt)


def adds(scales: list[float]) -> bool:
    """Whether ADD takes the scales of its terms, and at last that of the result: its factors are below 1."""
    return 2.0 * max(scales) < 2.0**SUM_BITS * scales[-1]


def add_scalar(terms: list[tuple[int, float]], scale: float, fmt: IntFormat) -> int:
    """Scalar twin of `add`."""
    twice = 2.0 * max(unit for _, unit in terms)
    total = sum(scaled_scalar(q * 2**SUM_BITS, unit / twice) for q, unit in terms)
    return _saturated_scalar(scaled_scalar(total, twice / (2.0**SUM_BITS * scale)), fmt)


def add(terms: list[tuple[torch.Tensor, float]], scale: float, fmt: IntFormat) -> torch.Tensor:
    """``sat(scaled(sum_i scaled(2^20 q_i, s_i / t), t / (2^20 scale)))``, t = 2 max s_i: ADD.

    Parameters
    ----------
    terms : list of (torch.Tensor, float)
        Integers of two tensors and their scales.
    scale, fmt
        Grid of the result, with a format of one plane and 8 bits.
    """
    twice = 2.0 * max(unit for _, unit in terms)
    parts = [scaled(q.to(torch.int64) << SUM_BITS, unit / twice) for q, unit in terms]
    total = torch.stack(parts).sum(0)
    return _saturated(scaled(total, twice / (2.0**SUM_BITS * scale)), fmt)


def _saturated_scalar(value: int, fmt: IntFormat) -> int:
    return min(max(value, fmt.minimum), fmt.maximum)


def _saturated(value: torch.Tensor, fmt: IntFormat) -> torch.Tensor:
    return value.clamp(fmt.minimum, fmt.maximum).to(torch.float32)
