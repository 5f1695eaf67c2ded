import ast
import math
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qinvert.checks import (
    MAX_SEED,
    check_decibels,
    check_flag,
    check_integer,
    check_magnitude,
    check_member,
    check_power_of_two,
    check_seed,
    is_float32,
)
from qinvert.errors import InputError, PlanError

ROOT = Path(__file__).parents[1]


class Fruit(StrEnum):
    APPLE = "apple"
    PEAR = "pear"
    PLUM = "plum"


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


@pytest.mark.parametrize("value", [0, 1, None, "no", "", np.True_, []])
def test_flags_are_booleans(value):
    with pytest.raises(PlanError, match=r"rotate .* is neither True nor False"):
        check_flag("rotate", value, PlanError)
    assert [check_flag("rotate", v, PlanError) for v in (True, False)] == [True, False]


@pytest.mark.parametrize("value", ["APPLE", "", "peach", None, 0, ["apple"], {"apple"}, b"apple"])
def test_what_is_no_member_is_named_with_all_that_are(value):
    with pytest.raises(PlanError, match=r"^fruit .* is unknown; use apple, pear or plum$"):
        check_member(Fruit, "fruit", value, PlanError)
    with pytest.raises(InputError, match=r"use any, apple, pear or plum$"):
        check_member(Fruit, "fruit", value, InputError, ("any",))


def test_members_come_back_by_value_and_as_they_are():
    for member in Fruit:
        assert check_member(Fruit, "fruit", member, PlanError) is member
        assert check_member(Fruit, "fruit", str(member), PlanError) is member


def own_membership(tree):
    """Lines that compare with all members of an enumeration instead of calling `check_member`."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and isinstance(node.ops[0], ast.NotIn)
        and isinstance(called := node.comparators[0], ast.Call)
        and isinstance(called.func, ast.Name)
        and called.func.id == "list"
    ]


def test_members_are_checked_in_one_place():
    assert own_membership(ast.parse("if a not in list(Kind): raise E")) == [1]
    assert own_membership(ast.parse("check_member(Kind, 'a', a, E)")) == []
    files = [path for name in ("qinvert", "calibration", "export") for path in (ROOT / name).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in files if own_membership(ast.parse(path.read_text()))}
    assert not found
