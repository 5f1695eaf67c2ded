from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinvert.errors import PlanError
from qinvert.formats import INT4, INT8, INT8X2, INT16, INT16_WHOLE, UINT8
from qinvert.numerics import accumulators, exact, scalar

scales = st.floats(min_value=2.0**-33, max_value=2.0**33, width=32)
integers = st.integers(-(2**15), 2**15 - 1)


def single(value) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32)


@given(q=st.integers(INT8X2.minimum, INT8X2.maximum), scale=scales)
def test_every_pair_of_planes_is_one_integer(q, scale):
    (high, high_scale), (low, low_scale) = scalar.planes_scalar(q, scale, INT8X2)
    assert 256 * high + low == q
    assert -128 <= min(high, low) <= max(high, low) <= 127
    assert (high_scale, low_scale) == (256 * scale, scale)
    planes = exact.planes(single(q), scale, INT8X2)
    assert [int(plane) for plane, _ in planes] == [high, low]
    assert [s for _, s in planes] == [high_scale, low_scale]


def test_partial_products_drop_low_times_low_and_share_accumulators():
    assert accumulators.partial_products(1, 1) == [[(0, 0)]]
    assert accumulators.partial_products(2, 1) == [[(0, 0)], [(1, 0)]]
    assert accumulators.partial_products(2, 2) == [[(0, 0)], [(0, 1), (1, 0)]]


@given(st.lists(st.tuples(integers, integers), max_size=20))
def test_dot_of_python_integers_is_the_int64_dot(pairs):
    left, right = [a for a, _ in pairs], [b for _, b in pairs]
    assert exact.dot_scalar(left, right) == int(np.dot(np.int64(left), np.int64(right)))


def test_dot_refuses_rows_of_different_length():
    with pytest.raises(ValueError, match="shorter"):
        exact.dot_scalar([1, 2], [1])


@pytest.mark.parametrize("formats", [(INT8, INT8), (INT4, INT4), (INT16, INT4), (UINT8, INT8)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (16, 33, 7), (4, 1024, 4)], ids=str)
def test_products_are_exact_whatever_the_format(formats, shape):
    m, k, n = shape
    generator = torch.Generator().manual_seed(k)
    left, right = (
        torch.randint(fmt.minimum, fmt.maximum + 1, (2, *size), generator=generator)
        for fmt, size in zip(formats, ((m, k), (k, n)), strict=True)
    )
    bound = k * max(255, formats[0].magnitude) * formats[1].magnitude
    product = exact.integer_matmul(left.float(), right.float(), bound)
    assert torch.equal(product.to(torch.int64), left @ right)
    rows, columns = left[1].tolist(), right[1].T.tolist()
    assert product[1].tolist() == [[exact.dot_scalar(row, column) for column in columns] for row in rows]


@pytest.mark.parametrize(("bound", "dtype"), [(2**24 - 1, torch.float32), (2**24, torch.float64)])
def test_float64_takes_over_where_float32_stops_being_exact(bound, dtype):
    assert exact.integer_matmul(torch.ones(2, 3), torch.ones(3, 2), bound).dtype == dtype


def test_int16_products_need_the_float64_path():
    left = torch.tensor([[32767.0, 1.0]])
    right = torch.tensor([[32767.0], [1.0]])
    expected = 32767 * 32767 + 1
    assert int(exact.integer_matmul(left, right, 2 * 32768**2 - 1)) == expected
    assert int(left @ right) != expected


def test_an_int8_accumulator_is_exact_in_float32_up_to_its_worst_case():
    left, right = torch.full((1, 1023), -128.0), torch.full((1023, 1), -128.0)
    product = exact.integer_matmul(left, right, 1023 * 128**2)
    assert product.dtype == torch.float32
    assert int(product) == 1023 * 128**2


@pytest.mark.parametrize("bound", [2**31, 2**31 + 1, 2**40])
def test_an_accumulator_beyond_int32_is_refused(bound):
    for check in (
        accumulators.check_accumulator,
        lambda b: exact.integer_matmul(single(1), single(1), b),
    ):
        with pytest.raises(PlanError, match=f"can reach {bound}, but this target's hold less than {2**31}"):
            check(bound)


@pytest.mark.parametrize(("magnitude", "limit"), [(7, 2**31), (128, 2**31), (129, 2**53), (32768, 2**53)])
def test_the_limit_is_that_of_the_narrower_operand(magnitude, limit):
    assert accumulators.accumulator_limit(magnitude) == limit
    accumulators.check_accumulator(limit - 1, limit)
    with pytest.raises(PlanError, match=f"can reach {limit}, but this target's hold less than {limit}"):
        accumulators.check_accumulator(limit, limit)


def test_whole_operands_are_one_plane_on_both_sides():
    assert accumulators.operand_magnitudes(INT16_WHOLE, right=True) == (32768,)
    assert accumulators.operand_magnitudes(INT16, right=True) == (128, 128)
    for fmt in (INT16, INT16_WHOLE):
        assert accumulators.operand_magnitudes(fmt, right=False) == (32768,)
    assert accumulators.plane_scales(INT16_WHOLE, 0.5, right=True) == (0.5,)
    assert accumulators.plane_scales(INT16, 0.5, right=True) == (128.0, 0.5)


def test_an_accumulator_that_just_fits_int32_is_taken():
    accumulators.check_accumulator(2**31 - 1)


def test_wide_operands_take_the_float64_path():
    # 257 is exact in float32 but neither in bfloat16 nor in TF32's 8 or 11 bits of every backend.
    left, right = torch.full((1, 2), 257.0), torch.ones(2, 1)
    assert exact.integer_matmul(left, right, 600, magnitude=256).dtype == torch.float32
    assert exact.integer_matmul(left, right, 600, magnitude=257).dtype == torch.float64
