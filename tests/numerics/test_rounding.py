from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinvert.errors import InputError, PlanError
from qinvert.formats import INT4, INT8, INT8X2, INT16, UINT8
from qinvert.numerics import rounding, scalar, scales

POWERS = [2.0**k for k in (-149, -126, -1, 0, 5, 127)]
FORMATS = (INT4, INT8, UINT8, INT16)
numbers = st.floats(width=32, allow_nan=False)
scale_values = st.floats(min_value=2.0**-33, max_value=2.0**33, width=32)
accumulators = st.integers(-(2**31) + 1, 2**31 - 1)
integers = st.integers(-(2**15), 2**15 - 1)
formats = st.sampled_from(FORMATS)


@pytest.mark.parametrize("value", POWERS)
def test_powers_of_two_have_a_mantissa_of_one_bit(value):
    assert scales.is_power_of_two(value)
    assert scales.is_power_of_two(-value)
    assert not scales.is_power_of_two(3 * value)
    assert not scales.is_power_of_two(0.0)


def nearest(x: Fraction) -> Fraction | float:
    """The float32 next to a rational number, ties to even, from integers alone."""
    if x == 0:
        return Fraction(0)
    exponent = math.frexp(abs(x.numerator) / x.denominator)[1] - 1 if 2**-1000 < abs(x) < 2**1000 else 0
    ulp = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(x / ulp) * ulp
    if abs(rounded) >= 2**128:
        return math.inf if x > 0 else -math.inf
    return rounded


def on_grid(x: float, scale: float, fmt) -> int:
    if math.isinf(x):
        return fmt.maximum if x > 0 else fmt.minimum
    steps = nearest(Fraction(x) / Fraction(scale))
    if isinstance(steps, float):
        return fmt.maximum if steps > 0 else fmt.minimum
    return min(max(round(steps) + fmt.zero_point, fmt.minimum), fmt.maximum)


def single(value) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32)


def step_from(value: float, direction: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(direction)))


def quantize_vector(x, scale, fmt):
    return int(rounding.quantize(single(x), scale, fmt)[0])


both_quantize = pytest.mark.parametrize("quantize", [scalar.quantize_scalar, quantize_vector])


@both_quantize
@pytest.mark.parametrize("scale", [1.0, 0.25, 2.0**-20, 2.0**10])
@pytest.mark.parametrize(
    ("tie", "below", "exact", "above"),
    [
        (-128.5, -128, -128, -128),
        (-127.5, -128, -128, -127),
        (-2.5, -3, -2, -2),
        (-1.5, -2, -2, -1),
        (-0.5, -1, 0, 0),
        (0.5, 0, 0, 1),
        (1.5, 1, 2, 2),
        (2.5, 2, 2, 3),
        (63.5, 63, 64, 64),
        (126.5, 126, 126, 127),
        (127.5, 127, 127, 127),
    ],
)
def test_int8_ties_go_to_even_and_one_float_step_decides(quantize, scale, tie, below, exact, above):
    at = [step_from(tie * scale, -math.inf), tie * scale, step_from(tie * scale, math.inf)]
    assert [quantize(x, scale, INT8) for x in at] == [below, exact, above]


@both_quantize
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("x", [1e6, 3.4e38, math.inf])
def test_both_ends_saturate_infinities_included(quantize, fmt, x):
    assert (quantize(-x, 1.0, fmt), quantize(x, 1.0, fmt)) == (fmt.minimum, fmt.maximum)


@both_quantize
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("zero", [0.0, -0.0, 1e-45])
def test_zero_is_the_zero_point(quantize, fmt, zero):
    assert quantize(zero, 0.5, fmt) == fmt.zero_point


@both_quantize
def test_nan_is_an_error_with_a_hint(quantize):
    with pytest.raises(InputError, match="cannot quantize NaN; look for the NaN upstream"):
        quantize(math.nan, 1.0, INT8)


def test_one_nan_among_many_values_is_found():
    x = torch.zeros(3, 5)
    x[2, 4] = math.nan
    with pytest.raises(InputError, match="NaN"):
        rounding.quantize(x, 1.0, INT8)


@given(x=numbers, scale=scale_values, fmt=formats)
def test_quantize_is_one_correctly_rounded_division_then_half_even(x, scale, fmt):
    expected = on_grid(x, scale, fmt)
    assert scalar.quantize_scalar(x, scale, fmt) == expected
    assert quantize_vector(x, scale, fmt) == expected


@given(half=st.integers(-130, 130), scale=scale_values)
def test_quantize_near_half_steps_of_any_scale(half, scale):
    middle = float(np.float32((half + 0.5) * scale))
    for x in (step_from(middle, -math.inf), middle, step_from(middle, math.inf)):
        expected = on_grid(x, scale, INT8)
        assert scalar.quantize_scalar(x, scale, INT8) == expected
        assert quantize_vector(x, scale, INT8) == expected


def test_multiplying_by_the_reciprocal_would_be_wrong_somewhere():
    scale = float(np.float32(1 / 127))
    x = (torch.arange(-127, 127) + 0.5) * scale
    by_division = rounding.quantize(x, scale, INT8)
    assert by_division.tolist() == [on_grid(v, scale, INT8) for v in x.tolist()]
    assert by_division.tolist() != torch.round(x * (1 / scale)).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_any_numeric_input_becomes_integer_valued_float32(dtype):
    q = rounding.quantize(torch.tensor([[3, -4]], dtype=dtype), 2.0, INT8)
    assert q.dtype == torch.float32
    assert q.tolist() == [[2.0, -2.0]]


@given(fmt=formats, scale=scale_values, data=st.data())
def test_dequantize_is_one_correctly_rounded_product(fmt, scale, data):
    q = data.draw(st.integers(fmt.minimum, fmt.maximum))
    expected = nearest((q - fmt.zero_point) * Fraction(scale))
    assert scalar.dequantize_scalar(q, scale, fmt) == expected
    assert float(rounding.dequantize(single(q), scale, fmt)[0]) == expected


@pytest.mark.parametrize("fmt", [INT4, INT8, UINT8], ids=str)
@pytest.mark.parametrize("scale", [1.0, float(np.float32(1 / 127)), float(np.float32(0.3))])
def test_every_integer_survives_dequantize_and_quantize(fmt, scale):
    q = torch.arange(fmt.minimum, fmt.maximum + 1, dtype=torch.float32)
    assert torch.equal(rounding.quantize(rounding.dequantize(q, scale, fmt), scale, fmt), q)


@given(st.floats(allow_nan=False))
def test_float32_rounds_to_nearest_and_overflows_to_infinity(value):
    expected = value if math.isinf(value) else nearest(Fraction(value))
    assert scales.float32(value) == expected


@pytest.mark.parametrize("scale", [1, 1.0, 0.25, 2.0**-99, 2.0**49, float(np.float32(0.1))])
def test_float32_scales_are_taken(scale):
    scales.check_scale(scale)


@pytest.mark.parametrize(
    "scale", [0.0, -1.0, math.nan, math.inf, 0.1, 2.0**-101, 2.0**50, 10**400, "1", None, [1.0]]
)
def test_other_scales_are_refused_with_the_legal_range(scale):
    with pytest.raises(PlanError, match=r"is not a float32 in \[1e-30, 1e\+15\]; calibrate again"):
        scales.check_scale(scale)


@given(left=scale_values, right=scale_values, output=scale_values)
def test_products_of_scales_round_once_per_operation(left, right, output):
    product = nearest(Fraction(left) * Fraction(right))
    assert scales.product_scale(left, right) == product
    assert scales.multiplier(left, right, output) == nearest(Fraction(product) / Fraction(output))


@given(
    acc=accumulators,
    unit=scale_values,
    addends=st.lists(st.tuples(integers, scale_values, st.sampled_from((1, -1))), max_size=3),
    scale=scale_values,
    fmt=formats,
)
def test_requantize_by_division_rounds_every_product_and_sum_once(acc, unit, addends, scale, fmt):
    signed = [(q, sign * s) for q, s, sign in addends]
    x = nearest(nearest(Fraction(acc)) * Fraction(unit))
    for q, s in signed:
        x = nearest(x + nearest(q * Fraction(s)))
    expected = on_grid(float(x), scale, fmt)
    assert scalar.requantize_divide_scalar(acc, unit, signed, scale, fmt) == expected
    exact = torch.tensor([acc], dtype=torch.float64)
    tensors = [(single(q), s) for q, s in signed]
    assert int(rounding.requantize_divide(exact, unit, tensors, scale, fmt)[0]) == expected


@given(acc=accumulators, factor=scale_values, fmt=formats)
def test_requantize_by_multiplier_rounds_accumulator_and_product_once(acc, factor, fmt):
    expected = on_grid(float(nearest(nearest(Fraction(acc)) * Fraction(factor))), 1.0, fmt)
    assert scalar.requantize_multiplier_scalar(acc, factor, fmt) == expected
    exact = torch.tensor([acc], dtype=torch.float64)
    assert int(rounding.requantize_multiplier(exact, factor, fmt)[0]) == expected


@given(
    q=integers,
    unit=scale_values,
    factor=scale_values,
    sign=st.sampled_from([1, -1]),
    scale=scale_values,
    fmt=formats,
)
def test_a_scaled_requantize_rounds_both_products_once(q, unit, factor, sign, scale, fmt):
    x = nearest(nearest(q * Fraction(unit)) * Fraction(sign * factor))
    expected = on_grid(float(x), scale, fmt)
    assert scalar.requantize_scaled_scalar(q, unit, sign * factor, scale, fmt) == expected
    assert int(rounding.requantize_scaled(single(q), unit, sign * factor, scale, fmt)[0]) == expected


@given(q=integers, unit=scale_values, scale=scale_values, fmt=formats)
def test_scaling_by_one_is_the_divide_form(q, unit, scale, fmt):
    divided = rounding.requantize_divide(single(q), unit, [], scale, fmt)
    assert torch.equal(rounding.requantize_scaled(single(q), unit, 1.0, scale, fmt), divided)


@pytest.mark.parametrize(
    ("acc", "factor", "expected"),
    [(1, 0.5, 0), (3, 0.5, 2), (5, 0.5, 2), (-1, 0.5, 0), (-3, 0.5, -2), (255, 0.5, 127), (-257, 0.5, -128)],
)
def test_requantize_ties_go_to_even_in_both_forms(acc, factor, expected):
    assert scalar.requantize_multiplier_scalar(acc, factor, INT8) == expected
    assert int(rounding.requantize_multiplier(single(acc), factor, INT8)[0]) == expected
    assert scalar.requantize_divide_scalar(acc, factor, [], 1.0, INT8) == expected
    assert int(rounding.requantize_divide(single(acc), factor, [], 1.0, INT8)[0]) == expected


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("factor", [1.0, 1e38])
def test_requantize_saturates_at_both_ends(fmt, factor):
    for acc, end in ((-(2**31) + 1, fmt.minimum), (2**31 - 1, fmt.maximum)):
        assert int(rounding.requantize_multiplier(single(acc), factor, fmt)[0]) == end
        assert int(rounding.requantize_divide(single(acc), 1.0, [], 1 / factor, fmt)[0]) == end


def test_the_scalar_multiplier_saturates_where_the_product_overflows():
    assert scalar.requantize_multiplier_scalar(2**31 - 1, 1e38, INT8) == 127


def test_legal_scales_never_make_nan_of_an_accumulator():
    with pytest.raises(PlanError, match="overflow float32"):
        scales.multiplier(2.0**49, 2.0**49, 2.0**-99)


@given(q=st.integers(INT8X2.minimum, INT8X2.maximum), scale=scale_values)
def test_two_planes_dequantize_by_two_products_and_a_sum(q, scale):
    low = (q + 128) % 256 - 128
    high = (q - low) // 256
    value = nearest(
        Fraction(nearest(high * Fraction(256 * scale))) + Fraction(nearest(low * Fraction(scale)))
    )
    assert scalar.dequantize_scalar(q, scale, INT8X2) == value
    assert float(rounding.dequantize(single(q), scale, INT8X2)[0]) == value


@given(x=st.floats(-40000, 40000, width=32), scale=st.sampled_from([1.0, 2.0**-7, float(np.float32(0.1))]))
def test_two_planes_round_one_after_the_other(x, scale):
    x = float(np.float32(x * scale))
    q = scalar.quantize_scalar(x, scale, INT8X2)
    assert int(rounding.quantize(single(x), scale, INT8X2)[0]) == q
    clamped = max(INT8X2.minimum, min(INT8X2.maximum, x / scale))
    # A rest of exactly half a high step saturates the low plane: one step more than half.
    assert abs(q - clamped) <= 1.01


def test_two_planes_saturate_on_both_ends():
    ends = torch.tensor([-math.inf, -1e9, 1e9, math.inf])
    expected = [INT8X2.minimum, INT8X2.minimum, INT8X2.maximum, INT8X2.maximum]
    assert rounding.quantize(ends, 1.0, INT8X2).tolist() == expected
    assert [scalar.quantize_scalar(float(e), 1.0, INT8X2) for e in ends] == expected


def test_the_right_operand_of_a_product_is_split_into_int8_planes():
    q = torch.arange(-32639.0, 32640.0)
    high, low = (plane for plane, _ in rounding.operand_planes(q, 2.0**-15, INT16))
    assert float((256 * high + low - q).abs().max()) <= 1
    assert int(high.abs().max()) <= 128
    assert int(low.abs().max()) <= 128
    (only,) = rounding.operand_planes(q[:3], 1.0, INT8)
    assert torch.equal(only[0], q[:3])


@given(st.integers(-(2**30), 2**30), st.integers(-(2**30), 2**30), st.integers(1, 2**20))
def test_partial_products_are_rounded_one_by_one(high, low, odd):
    factor, scale = scales.float32(odd * 2.0**-40), 2.0**-15
    accumulators = [torch.tensor([float(a)], dtype=torch.float64) for a in (high, low)]
    (found,) = rounding.requantize_partial(accumulators, factor, scale, INT16).tolist()
    assert found == scalar.requantize_partial_scalar([high, low], factor, scale, INT16)
    parts = [scalar.requantize_multiplier_scalar(a, factor * w, INT16) for a, w in ((high, 256), (low, 1))]
    assert found == max(-(2**15), min(2**15 - 1, sum(parts)))


def test_one_partial_product_is_a_product():
    accumulator = torch.arange(-300.0, 300.0)
    single = rounding.requantize_partial([accumulator], 0.37, 0.1, INT8)
    assert torch.equal(single, rounding.requantize_multiplier(accumulator, 0.37, INT8))
