"""The residual steps of a kernel's division, against exact rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qinvert.kernels.division import residual_steps

#: A scale for which one step leaves an integer wrong, or too near a tie to tell.
HARD = next(s for k in range(20, 400) if residual_steps(s := float(np.float32(1) / np.float32(k))) == 2)


def rounded(value: Fraction) -> np.float32:
    """Return the nearest float32, ties to even."""
    near = np.float32(float(value))
    tries = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(tries, key=lambda f: (abs(Fraction(float(f)) - value), int(f.view(np.int32)) & 1))


def quotient(x, scale, steps):
    """Return what the kernel computes: a product and fused residual steps, each rounded once."""
    exact, divisor = Fraction(float(x)), Fraction(float(scale))
    reciprocal = Fraction(float(np.float32(1) / np.float32(scale)))
    q = rounded(exact * reciprocal)
    for _ in range(steps):
        residual = rounded(exact - Fraction(float(q)) * divisor)
        q = rounded(Fraction(float(residual)) * reciprocal + Fraction(float(q)))
    return q


def near_ties(scale):
    for tie in (0.5, 1.5, 2.5, 31.5, 64.5, 100.5, 126.5, 127.5):
        x = np.float32(np.float32(tie) * np.float32(scale))
        for _ in range(3):
            x = np.nextafter(x, np.float32(0))
        for _ in range(7):
            yield x
            x = np.nextafter(x, np.float32(np.inf))


@given(st.floats(2.0**-14, 1, width=32), st.floats(-130, 130, width=32))
@settings(max_examples=40, deadline=None)
def test_the_steps_that_are_found_give_the_right_integer(scale, ratio):
    steps = residual_steps(scale)
    for x in (np.float32(ratio * scale), *near_ties(scale)):
        assert np.rint(quotient(x, scale, steps)) == np.rint(x / np.float32(scale))


@pytest.mark.parametrize("scale", [1.0, 0.25, 2.0**-20])
def test_powers_of_two_need_none(scale):
    assert residual_steps(scale) == 0


def test_two_steps_give_the_quotient_itself():
    for scale in (HARD, float(np.float32(0.1)), float(np.float32(1) / 127)):
        for x in near_ties(scale):
            assert quotient(x, scale, 2) == x / np.float32(scale)


def test_most_scales_need_one_and_some_need_two():
    scales = np.exp2(np.random.default_rng(0).uniform(-14, 0, 200)).astype(np.float32)
    assert {residual_steps(float(s)) for s in scales} == {1}
    assert residual_steps(HARD) == 2
    # No step at all is not enough for them.
    assert any(np.rint(quotient(x, s, 0)) != np.rint(x / s) for s in scales[:20] for x in near_ties(float(s)))
