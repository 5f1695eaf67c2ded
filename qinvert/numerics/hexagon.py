"""How Qualcomm's Hexagon rounds int8 and int16 graphs, bit for bit: differently from ONNX.

The laws were found by comparing the emulator of QAIRT 2.51 (onnxruntime-qnn
2.7; v73, v75 and v79 agree) operator by operator: products with 33 factors
from 3e-4 to 2.3, inputs on float and power-of-two scales, sums of all pairs
of int8.  Products int16 x int16 and int16 x int8 were compared on v73 and v81,
with random factors and sums of 1 to 128 products.  `qinvert.verify` compares
every value of that emulator with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import numpy as np
import torch

from qinvert.formats import IntFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How many bits of a factor and of an accumulator one rounding keeps."""

    #: Significant bits of the factor that an accumulator is multiplied by.
    factor_bits: int
    #: Bits of an accumulator that are kept below one step of the result; those below are cut off.
    guard_bits: int


#: Of results of 8 bits.
NARROW: Final = Precision(factor_bits=12, guard_bits=3)
#: Of results of 16 bits.
WIDE: Final = Precision(factor_bits=22, guard_bits=7)
#: Largest integer of a right operand of 16 bits: it enters as two signed bytes, ``256 * 127 + 127``.
RIGHT_MAXIMUM: Final = 32639
#: Bits that are cut off the sums of products with a left operand of 16 bits, for a right one of 8 and 16.
CUT_BITS: Final = (8, 16)
#: Scales whose reciprocal is a normal float16, with room for the quotient.
SCALES: Final = (2.0**-14, 2.0**14)


def quantize_scalar(x: float, scale: float, fmt: IntFormat) -> int:
    """Scalar twin of `quantize`."""
    with np.errstate(over="ignore"):
        quotient = np.float16(x) * np.float16(1 / scale)
    magnitude = math.floor(min(abs(float(quotient)), 2.0**20) + 0.5)
    return min(max(int(math.copysign(magnitude, x)), fmt.minimum), fmt.maximum)


def quantize(x: torch.Tensor, scale: float, fmt: IntFormat) -> torch.Tensor:
    """``sat(round_half_away(float16(float16(x) float16(1 / scale))))``, as integer-valued float32.

    Parameters
    ----------
    x : torch.Tensor
        Any float dtype.
    scale : float
        In [2^-14, 2^14].
    fmt : IntFormat
        Format of one plane and 8 bits.
    """
    quotient = (x.to(torch.float16) * float(np.float16(1 / scale))).to(torch.float32)
    rounded = torch.floor(quotient.abs() + 0.5).copysign(quotient)
    return rounded.clamp(fmt.minimum, fmt.maximum) + 0.0


def cut_bits(right: IntFormat) -> int:
    """Return how many bits `cut` takes off sums of products with a right operand of this format."""
    return CUT_BITS[right.is_wide]


def cut_scalar(left: list[int], right: list[int], fmt: IntFormat) -> int:
    """Scalar twin of a sum of products and of `cut`, by the two terms that the law was found as."""
    limited = [clamped_scalar(b, fmt) for b in right]
    # The left operand is made unsigned, and what that adds is taken off again, rounded up.
    unsigned = sum((a + 2**15) * b for a, b in zip(left, limited, strict=True))
    return (unsigned >> cut_bits(fmt)) + (-(2**15) * sum(limited) >> cut_bits(fmt))


def clamped_scalar(right: int, fmt: IntFormat) -> int:
    """Scalar twin of `clamped`."""
    return min(right, RIGHT_MAXIMUM) if fmt.is_wide else right


def clamped(right: torch.Tensor, fmt: IntFormat) -> torch.Tensor:
    """``min(right, 32639)`` for 16 bits: what a product with a left operand of 16 bits reads."""
    return right.clamp(max=RIGHT_MAXIMUM) if fmt.is_wide else right


def cut(total: torch.Tensor, column_sums: torch.Tensor, fmt: IntFormat) -> torch.Tensor:
    """``floor((S - 2^15 (h mod 2)) / 2^16)``, and ``floor(S / 2^8)`` for a right operand of 8 bits.

    The accumulator of a product whose left operand has 16 bits, in float64.  An
    odd sum of a column therefore costs half a step of the accumulator.

    Parameters
    ----------
    total : torch.Tensor
        ``S``: exact sums of products ``(..., m, n)``, below 2^52.
    column_sums : torch.Tensor
        ``h``: sums of the columns of the right operand `clamped`, ``(..., 1, n)``.
    fmt : IntFormat
        Format of the right operand.
    """
    odd = torch.remainder(column_sums.to(torch.float64), 2) if fmt.is_wide else 0
    return torch.floor((total.to(torch.float64) - 2**15 * odd) / 2 ** cut_bits(fmt))


def factor_of(multiplier: float, precision: Precision = NARROW) -> tuple[float, int]:
    """Return the multiplier to so many bits, ties up, and how many bits of an accumulator are cut first."""
    mantissa, exponent = math.frexp(multiplier)
    bits = precision.factor_bits
    rounded = math.ldexp(math.floor(mantissa * 2**bits + 0.5), exponent - bits)
    return rounded, -exponent - precision.guard_bits


def _precision(fmt: IntFormat) -> Precision:
    return WIDE if fmt.is_wide else NARROW


def requantize_scalar(accumulator: int, multiplier: float, fmt: IntFormat) -> int:
    """Scalar twin of `requantize`."""
    factor, bits = factor_of(multiplier, _precision(fmt))
    unit = Fraction(2) ** bits
    middle = (math.floor(accumulator / unit) + Fraction(1, 2)) * unit
    return min(max(math.floor(middle * Fraction(factor) + Fraction(1, 2)), fmt.minimum), fmt.maximum)


def requantize(accumulator: torch.Tensor, multiplier: float, fmt: IntFormat) -> torch.Tensor:
    """``sat(floor((floor(acc / 2^k) + 1/2) 2^k f + 1/2))``, as integer-valued float32.

    ``f`` is the multiplier to 12 significant bits, and ``2^k`` the largest
    power of two below ``1 / (8 f)``.  The part that is cut off counts as half of
    ``2^k``.  So ties go up, and the error of a result exceeds the half step of
    rounding to nearest by at most 1/16 of a step and 2^-12 of the result.
    For results of 16 bits read 22 bits, ``1 / (128 f)``, 1/256 and 2^-22.

    Parameters
    ----------
    accumulator : torch.Tensor
        Exact integers, float32 or float64, residual terms already added; for results
        of 16 bits what `cut` returns.
    multiplier : float
        `qinvert.plan.integer_product.IntegerProduct.factor`, for results of 16 bits times
        ``2^n`` where n is `cut_bits`.
    fmt : IntFormat
        Format of the result, of one plane and 8 or 16 bits.
    """
    factor, bits = factor_of(multiplier, _precision(fmt))
    unit = 2.0**bits
    middle = (torch.floor(accumulator.to(torch.float64) / unit) + 0.5) * unit
    return torch.floor(middle * factor + 0.5).clamp(fmt.minimum, fmt.maximum).to(torch.float32)


def add_scalar(terms: list[tuple[int, float]], scale: float, fmt: IntFormat) -> int:
    """Scalar twin of `add`."""
    total = sum((Fraction(q) * Fraction(unit) for q, unit in terms), Fraction(0))
    return min(max(math.floor(total / Fraction(scale) + Fraction(1, 2)), fmt.minimum), fmt.maximum)


def add(terms: list[tuple[torch.Tensor, float]], scale: float, fmt: IntFormat) -> torch.Tensor:
    """``sat(floor(sum_i q_i s_i / scale + 1/2))``, as integer-valued float32: ties go up.

    Parameters
    ----------
    terms : list of (torch.Tensor, float)
        Integers and their scales, which all equal ``scale``, or are powers of two
        like ``scale``.  For others the emulator's fixed-point factors are not known.
    scale, fmt
        Grid of the result, with a format of one plane; 16 bits only where all scales are equal.
    """
    # Integers of 8 bits times powers of two between 2^-14 and 2^14 are exact in float64.
    total = torch.stack([q.to(torch.float64) * unit for q, unit in terms]).sum(0)
    return torch.floor(total / scale + 0.5).clamp(fmt.minimum, fmt.maximum).to(torch.float32)
