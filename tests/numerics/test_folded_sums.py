from fractions import Fraction

import numpy as np
import pytest

from qinvert.numerics.folded_sums import MAX_LOSS, folded_loss, loses
from qinvert.numerics.scales import float32

ZERO = 128
INTEGERS = np.arange(-128, 128, dtype=np.float32)


def folded(scales, result):
    """Emulate QLinearAdd of onnxruntime for all pairs of uint8 values; the finer operand joins first."""
    first, second = (np.float32(s) / np.float32(result) for s in scales)
    offset = np.float32(ZERO) - (first * np.float32(ZERO) + second * np.float32(ZERO))
    total = (INTEGERS[:, None] + ZERO) * first + (offset + (INTEGERS + ZERO) * second)
    return np.clip(np.rint(total), 0, 255) - ZERO


def plain(scales, result):
    first, second = map(np.float32, scales)
    total = (INTEGERS[:, None] * first + INTEGERS * second) / np.float32(result)
    return np.clip(np.rint(total), -128, 127)


def test_the_offset_of_an_extreme_ratio_is_wrong_everywhere_and_for_zero():
    scales, result = (float32(3.0e4), float32(6.9e-3)), float32(6.9e-3)
    wrong = folded(scales, result) != plain(scales, result)
    assert wrong[128].sum() > 200
    assert folded_loss(scales, result) > 32
    assert loses(scales, result)


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_holds_for_the_folded_offset(seed):
    generator = np.random.default_rng(seed)
    for exponents in generator.uniform(-3, 7, size=(50, 2)):
        scales, result = [float32(10.0**e / 77) for e in exponents], float32(1 / 77)
        first, second = (np.float32(s) / np.float32(result) for s in scales)
        offset = np.float32(ZERO) - (first * np.float32(ZERO) + second * np.float32(ZERO))
        exact = ZERO - sum(ZERO * Fraction(float(ratio)) for ratio in (first, second))
        assert abs(Fraction(float(offset)) - exact) <= 2 * Fraction(folded_loss(scales, result))


@pytest.mark.parametrize("seed", range(20))
def test_within_the_bound_folded_sums_differ_at_ties_only(seed):
    generator = np.random.default_rng(seed)
    result = float32(generator.uniform(0.004, 0.008))
    scales = [float32(result * ratio) for ratio in generator.uniform(0.1, 15, size=2)]
    assert folded_loss(scales, result) <= MAX_LOSS
    difference = np.abs(folded(scales, result) - plain(scales, result))
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= 2 * MAX_LOSS * difference.size


def test_powers_of_two_lose_nothing_while_float32_holds_every_sum():
    scales, result = (2.0**6, 2.0**-8), 2.0**-8
    assert folded_loss(scales, result) == 0
    assert np.array_equal(folded(scales, result), plain(scales, result))
    assert folded_loss((2.0**17, 2.0**-8), result) > MAX_LOSS
