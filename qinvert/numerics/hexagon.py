"""How Qualcomm's Hexagon rounds int8 graphs, bit for bit: differently from ONNX.

The laws were found by comparing the emulator of QAIRT 2.51 (onnxruntime-qnn
2.7; v73, v75 and v79 agree) operator by operator: products with 33 factors
from 3e-4 to 2.3, inputs on float and power-of-two scales, sums of all pairs
of int8.  `qinvert.verify` compares every value of that emulator with them.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

import numpy as np
import torch

from qinvert.formats import IntFormat

#: Significant bits of the factor that an accumulator is multiplied by.
FACTOR_BITS: Final = 12
#: Bits of an accumulator that are kept below one step of the result; those below are cut off.
GUARD_BITS: Final = 3
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


def factor_of(multiplier: float) -> tuple[float, int]:
    """Return the multiplier to 12 bits, ties up, and how many bits of an accumulator are cut first."""
    mantissa, exponent = math.frexp(multiplier)
    rounded = math.ldexp(math.floor(mantissa * 2**FACTOR_BITS + 0.5), exponent - FACTOR_BITS)
    return rounded, -exponent - GUARD_BITS


def requantize_scalar(accumulator: int, multiplier: float, fmt: IntFormat) -> int:
    """Scalar twin of `requantize`."""
    factor, bits = factor_of(multiplier)
    unit = Fraction(2) ** bits
    middle = (math.floor(accumulator / unit) + Fraction(1, 2)) * unit
    return min(max(math.floor(middle * Fraction(factor) + Fraction(1, 2)), fmt.minimum), fmt.maximum)


def requantize(accumulator: torch.Tensor, multiplier: float, fmt: IntFormat) -> torch.Tensor:
    """``sat(floor((floor(acc / 2^k) + 1/2) 2^k f + 1/2))``, as integer-valued float32.

    ``f`` is the multiplier to 12 significant bits, and ``2^k`` the largest
    power of two below ``1 / (8 f)``.  The part that is cut off counts as half of
    ``2^k``.  So ties go up, and the error of a result exceeds the half step of
    rounding to nearest by at most 1/16 of a step and 2^-12 of the result.

    Parameters
    ----------
    accumulator : torch.Tensor
        Exact integers, float32 or float64, residual terms already added.
    multiplier : float
        `qinvert.plan.integer_product.IntegerProduct.factor`.
    fmt : IntFormat
        Format of the result, of one plane and 8 bits.
    """
    factor, bits = factor_of(multiplier)
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
        Grid of the result, with a format of one plane and 8 bits.
    """
    # Integers of 8 bits times powers of two between 2^-14 and 2^14 are exact in float64.
    total = torch.stack([q.to(torch.float64) * unit for q, unit in terms]).sum(0)
    return torch.floor(total / scale + 0.5).clamp(fmt.minimum, fmt.maximum).to(torch.float32)
