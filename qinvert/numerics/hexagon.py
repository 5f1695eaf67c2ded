"""How Qualcomm's Hexagon rounds int8 graphs: not as ONNX says, and here bit for bit.

The laws were found by comparing the emulator of QAIRT 2.51 (onnxruntime-qnn
2.7; v73, v75 and v79 agree) operator by operator: products with 33 factors
from 3e-4 to 2.3, inputs on float and power-of-two scales, sums of all pairs
of int8.  `qinvert.verify` holds every value of that emulator to them.
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
#: An accumulator is cut to multiples of this many bits below what one step of the result is.
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
        Of one plane and 8 bits.
    """
    quotient = (x.to(torch.float16) * float(np.float16(1 / scale))).to(torch.float32)
    rounded = torch.floor(quotient.abs() + 0.5).copysign(quotient)
    return rounded.clamp(fmt.minimum, fmt.maximum) + 0.0


def factor_of(multiplier: float) -> tuple[float, int]:
    """Return the multiplier rounded to 12 bits, and how many bits of an accumulator are cut first."""
    mantissa, exponent = math.frexp(multiplier)
    rounded = math.ldexp(round(mantissa * 2**FACTOR_BITS), exponent - FACTOR_BITS)
    return rounded, -exponent - GUARD_BITS


def requantize_scalar(accumulator: int, multiplier: float, fmt: IntFormat) -> int:
    """Scalar twin of `requantize`."""
    factor, bits = factor_of(multiplier)
    unit = Fraction(2) ** bits
    middle = (math.floor(accumulator / unit) + Fraction(1, 2)) * unit
    return min(max(math.floor(middle * Fraction(factor) + Fraction(1, 2)), fmt.minimum), fmt.maximum)


def requantize(accumulator: torch.Tensor, multiplier: float, fmt: IntFormat) -> torch.Tensor:
    """``sat(floor((floor(acc / 2^k) + 1/2) 2^k f + 1/2))``, as integer-valued float32.

    ``f`` is the multiplier to 12 significant bits and ``2^k`` the largest
    power of two below ``1 / (8 f)``: what is cut off counts as its middle.  So
    ties go up, and a result is within 1/16 and 2^-12 of itself of the half
    step that rounding to nearest allows.

    Parameters
    ----------
    accumulator : torch.Tensor
        Exact integers, float32 or float64, residual terms already added.
    multiplier : float
        `LayerPlan.multiplier`.
    fmt : IntFormat
        Of the result, of one plane and 8 bits.
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
        Integers and their scales, powers of two like ``scale``: of others the
        emulator's fixed-point factors are not known.
    scale, fmt
        Of the result, of one plane and 8 bits.
    """
    # Integers of 8 bits times powers of two within 2^-14 and 2^14: exact in float64.
    total = torch.stack([q.to(torch.float64) * unit for q, unit in terms]).sum(0)
    return torch.floor(total / scale + 0.5).clamp(fmt.minimum, fmt.maximum).to(torch.float32)
