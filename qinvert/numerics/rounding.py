"""The only module that rounds to integers.

Every primitive exists twice: as a scalar twin over Python integers and
`numpy.float32`, which is written to be read (`qinvert.numerics.scalar`), and as
the vectorised form over `torch.Tensor` that the simulator runs.  Tests compare
the two with each other and with onnxruntime.

Quantized values travel as *integer-valued float32 tensors*: every integer of
up to 16 bits is exact in float32, and so is an int8 accumulator
(``K * 127**2 < 2**24`` for ``K <= 1040``), so matrix products run on the
fastest kernels without losing a bit.  What never rounds is in
`qinvert.numerics.exact` and `qinvert.numerics.accumulators`.
"""

from __future__ import annotations

import math

import torch

from qinvert.errors import InputError
from qinvert.formats import INT8, INT8X2, PLANE_RATIO, IntFormat
from qinvert.numerics.accumulators import partial_factors
from qinvert.numerics.exact import Scale, planes


def quantize(x: torch.Tensor, scale: float | torch.Tensor, fmt: IntFormat) -> torch.Tensor:
    """``sat(round_half_even(x / scale) + zero_point)``, elementwise.

    Parameters
    ----------
    x : torch.Tensor
        Any shape; converted to float32 first.
    scale : float or torch.Tensor
        A float32 value, or float32 values that broadcast against ``x``.
    fmt : IntFormat
        Its ends are where values saturate.

    Returns
    -------
    torch.Tensor
        Integer-valued float32; bit-exact with ONNX QuantizeLinear, or for
        two planes with two of them around a Sub.

    Raises
    ------
    InputError
        If ``x`` holds a NaN.  Infinities saturate.
    """
    x = x.to(torch.float32)
    # max() of values with a NaN is NaN, and it takes one pass.
    if x.numel() and math.isnan(float(x.max())):
        raise InputError("cannot quantize NaN; look for the NaN upstream of the inverse")
    return _round(x, scale, fmt)


def _round(x: torch.Tensor, scale: float | torch.Tensor, fmt: IntFormat) -> torch.Tensor:
    if fmt.planes == 1:
        return _saturate(_divide(x, scale), fmt)
    high = _saturate(_divide(x, PLANE_RATIO * scale), INT8)
    low = _saturate(_divide(x - high * (PLANE_RATIO * scale), scale), INT8)
    return PLANE_RATIO * high + low


def _divide(x: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    # A scalar divisor on the host lets CUDA multiply by its reciprocal instead,
    # which is sometimes off by one step.  So the divisor is a tensor on the device.
    return x / _on_device(scale, x)


def _on_device(scale: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if isinstance(scale, torch.Tensor):
        return scale
    return torch.tensor(scale, dtype=torch.float32, device=x.device)


def _saturate(steps: torch.Tensor, fmt: IntFormat) -> torch.Tensor:
    if fmt.is_float:
        return steps
    # This works in place: every caller passes a new tensor, and passes over memory take time.
    steps = steps.round_()
    if fmt.zero_point:
        steps += fmt.zero_point
    return steps.clamp_(fmt.minimum, fmt.maximum)


def operand_planes(q: torch.Tensor, scale: float, fmt: IntFormat) -> list[tuple[torch.Tensor, float]]:
    """Return `planes` of the right operand of a product, int16 split into two int8 planes.

    No runtime multiplies int16 by int16: the graph rounds the dequantized
    operand to int8, and then the rest to int8.  This function does the same.
    """
    if fmt.is_split:
        q, fmt = _round(dequantize(q, scale, fmt), scale, INT8X2), INT8X2
    return planes(q, scale, fmt)


def dequantize(q: torch.Tensor, scale: Scale, fmt: IntFormat) -> torch.Tensor:
    """``float32(q - zero_point) * scale``, summed over planes in float32.

    Bit-exact with ONNX DequantizeLinear, and for two planes with an Add of two.
    """
    (first, first_scale), *rest = planes(q.to(torch.float32), scale, fmt)
    value = first * first_scale
    for plane, plane_scale in rest:
        value = value + plane * plane_scale
    return value


def quantize_exponential(x: torch.Tensor, scale: float, fmt: IntFormat) -> torch.Tensor:
    """``sat(round_half_even(float32(exp(x)) / scale))``, exp rounded to float32 once.

    Libraries compute exp in float32 to within a few units in the last place; see
    `qinvert.numerics.exponentials` for grids on which all of them give the same integers.

    Parameters
    ----------
    x : torch.Tensor
        float32, not positive.
    scale, fmt
        Grid of the result.
    """
    return _round(torch.exp(x.to(torch.float64)).to(torch.float32), scale, fmt)


def requantize_divide(
    accumulator: torch.Tensor,
    unit: float,
    addends: list[tuple[torch.Tensor, float]],
    scale: float,
    fmt: IntFormat,
    *,
    overwrite: bool = False,
) -> torch.Tensor:
    """``sat(round_half_even((float32(acc) * unit + sum_i float32(q_i) * s_i) / scale))``.

    This is what MatMulInteger, Cast, Mul, Add and QuantizeLinear compute one after
    the other: each product and each sum is rounded to float32, from left to right.

    Parameters
    ----------
    accumulator : torch.Tensor
        Exact integers, float32 or float64.
    unit : float
        Real value of one accumulator step, `product_scale` of the operands.
    addends : list of (torch.Tensor, float)
        Lighter accumulators, then residual planes, with their scales; a
        negative scale subtracts.
    scale, fmt
        Grid of the result.
    overwrite : bool
        Whether the memory of ``accumulator`` may hold the result.
    """
    x = _scaled(accumulator, unit, overwrite)
    for q, addend_scale in addends:
        # This is not add with alpha, which may round the product and the sum at once.
        x += q.to(torch.float32) * addend_scale
    if fmt.planes > 1:
        return _round(x, scale, fmt)
    return _saturate(x.div_(_on_device(scale, x)), fmt)


def _scaled(accumulator: torch.Tensor, factor: float, overwrite: bool) -> torch.Tensor:
    # New memory costs more than the product: on a CPU every new page is a page fault.
    if overwrite and accumulator.dtype == torch.float32:
        return accumulator.mul_(factor)
    return accumulator.to(torch.float32) * factor


def requantize_scaled(
    q: torch.Tensor, unit: float, factor: float, scale: float, fmt: IntFormat
) -> torch.Tensor:
    """``sat(round_half_even(float32(float32(q * unit) * factor) / scale))``.

    This is what Cast, Mul, Mul and QuantizeLinear compute one after the other.

    Parameters
    ----------
    q : torch.Tensor
        Integers of the source.
    unit : float
        Scale of the source.
    factor : float
        Number by which the real value is multiplied.
    scale, fmt
        Grid of the result.
    """
    return _round(q.to(torch.float32) * unit * factor, scale, fmt)


def requantize_partial(
    accumulators: list[torch.Tensor], factor: float, scale: float, fmt: IntFormat, *, overwrite: bool = False
) -> torch.Tensor:
    """``sat(sum_i sat(round_half_even(float32(acc_i) * f_i)))``, ``f_i`` the factor of plane i.

    For one accumulator this is what QLinearMatMul computes.  For a right operand
    of two planes it is one such product per plane, and a quantized Add of both.

    Parameters
    ----------
    accumulators : list of torch.Tensor
        One accumulator, or that of the high plane and that of the low one.
    factor : float
        `multiplier` of the three scales, which is the factor of the low plane.
    scale, fmt
        Grid of the result.
    overwrite : bool
        Whether the memory of the accumulators may hold the result.
    """
    first, *rest = (
        requantize_multiplier(accumulator, weighted, fmt, overwrite=overwrite)
        for accumulator, weighted in zip(
            accumulators, partial_factors(factor, len(accumulators)), strict=True
        )
    )
    addends = [(q, scale) for q in rest]
    return requantize_divide(first, scale, addends, scale, fmt, overwrite=True) if rest else first


def requantize_multiplier(
    accumulator: torch.Tensor, factor: float, fmt: IntFormat, *, overwrite: bool = False
) -> torch.Tensor:
    """``sat(round_half_even(float32(acc) * factor))``, bit-exact with QLinearMatMul.

    Parameters
    ----------
    accumulator : torch.Tensor
        Exact integers, float32 or float64, residual terms already added as
        integers.
    factor : float
        `multiplier` of the three scales.
    fmt : IntFormat
        Format of the result.
    overwrite : bool
        Whether the memory of ``accumulator`` may hold the result.
    """
    return _saturate(_scaled(accumulator, factor, overwrite), fmt)
