import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qinvert.checks import (
    MAX_SEED,
    check_decibels,
    check_integer,
    check_magnitude,
    check_power_of_two,
    check_seed,
    is_float32,
)
from qinvert.errors import InputError, PlanError


@pytest.mark.parametrize("value", [0, 5, True, None, 2.0, "3", -(10**30)])
def test_what_is_no_integer_of_the_range_is_named(value):
    with pytest.raises(PlanError, match=r"order .* is not in \[1, 4\]; try 2"):
        check_integer("order", value, 1, 4, PlanError, "; try 2")


def test_legal_integers_come_back():
    assert [check_integer("order", v, 1, 4, PlanError) for v in (1, 4)] == [1, 4]
    assert [check_power_of_two("base", v, 1, 64, PlanError) for v in (1, 2, 64)] == [1, 2, 64]
    assert [check_seed(v, InputError) for v in (0, MAX_SEED)] == [0, MAX_SEED]


@pytest.mark.parametrize("value", [0, 3, 128, True, 2.0, None])
def test_what_is_no_power_of_two_of_the_range_is_named(value):
    with pytest.raises(PlanError, match=r"base .* is not a power of two in \[1, 64\]"):
        check_power_of_two("base", value, 1, 64, PlanError)


@pytest.mark.parametrize("value", [math.nan, math.inf, "20", None, True])
def test_goals_are_finite_numbers(value):
    with pytest.raises(InputError, match=r"goal .* is not a number of decibels"):
        check_decibels("goal", value, InputError)
    assert check_decibels("goal", 20, InputError) == 20.0


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 1.0, None])
def test_seeds_that_generators_refuse_are_refused(seed):
    with pytest.raises(InputError, match="seed"):
        check_seed(seed, InputError)


@given(value=st.floats(allow_nan=True) | st.integers(-(2**200), 2**200) | st.floats(width=32))
def test_float32_values_are_those_that_numpy_keeps(value):
    with np.errstate(over="ignore"):
        kept = bool(np.isfinite(np.float32(value))) and float(np.float32(value)) == value
    assert is_float32(value) is kept


@pytest.mark.parametrize("value", [True, None, "1", math.nan, math.inf, 0.1, 1e39, 10**400])
def test_what_is_no_float32_is_told(value):
    assert not is_float32(value)
    assert all(is_float32(v) for v in (0, -0.5, 2**24, 2.0**-149, 2.0**127))


@pytest.mark.parametrize("value", [-0.1, math.nan, "1", None, True])
def test_magnitudes_are_numbers_of_at_least_0(value):
    with pytest.raises(PlanError, match=r"limit .* is not a number of at least 0; try 1"):
        check_magnitude("limit", value, PlanError, "try 1")
    assert [check_magnitude("limit", v, PlanError, "") for v in (0, 0.5, math.inf)] == [0, 0.5, math.inf]
