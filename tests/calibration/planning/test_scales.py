import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qinvert.calibration.planning.scales import (
    MAX_IDENTITY_BLOCKS,
    ScaleRule,
    allows_multiplier,
    choose_quantizations,
    choose_scale,
    hold_partial_products,
    residual_partners,
    scale_groups,
)
from qinvert.formats import INT4, INT8, INT8X2, INT16
from qinvert.methods import block_merge, neumann_doubling
from qinvert.numerics import scales
from qinvert.plan.quantization import Requantize

LIMITS = st.floats(1e-25, 1e12)


@given(limit=LIMITS, fmt=st.sampled_from([INT8, INT4]), rule=st.sampled_from(ScaleRule))
def test_a_scale_covers_its_range_to_a_small_part_of_a_step(limit, fmt, rule):
    scale = choose_scale(limit, fmt, rule)
    scales.check_scale(scale)
    assert limit / scale <= fmt.largest + 0.01


@given(limit=LIMITS, fmt=st.sampled_from([INT8, INT4]))
def test_a_float_scale_wastes_little(limit, fmt):
    assert choose_scale(limit, fmt, ScaleRule.FLOAT) <= 1.03 * limit / fmt.largest


@given(limit=LIMITS)
def test_a_power_of_two_scale_wastes_less_than_a_bit(limit):
    scale = choose_scale(limit, INT8, ScaleRule.POW2)
    assert math.frexp(scale)[0] == 0.5
    assert scale < 2.001 * limit / 127


@given(limit=st.floats(1e-9, 127), fmt=st.sampled_from([INT8, INT4]), rule=st.sampled_from(ScaleRule))
def test_a_reciprocal_scale_holds_one_in_a_bounded_number_of_blocks(limit, fmt, rule):
    scale = choose_scale(min(limit, fmt.largest), fmt, rule, reciprocal=True)
    k = round(1 / scale)
    assert scales.float32(1 / k) == scale
    assert 1 <= k <= MAX_IDENTITY_BLOCKS * fmt.largest
    assert rule is ScaleRule.POW2 or k % 2 == 1


@pytest.mark.parametrize(("limit", "scale"), [(1.0, 1 / 127), (1 + 1e-7, 1 / 127), (0.0, 1 / 127)])
def test_a_range_of_one_is_the_grid_of_127_steps(limit, scale):
    assert choose_scale(limit, INT8, ScaleRule.FLOAT) == scales.float32(scale)


def test_an_infinite_range_gets_the_largest_scale():
    scales.check_scale(choose_scale(math.inf, INT8, ScaleRule.FLOAT))
    assert choose_scale(math.inf, INT8, ScaleRule.FLOAT) > 1e14


def test_moves_share_a_grid_and_products_do_not():
    program = block_merge(16, base=4)
    groups = scale_groups(program)
    assert groups["merge_8/S11"] == groups["merge_16/S"] == groups["base_4/S"]
    assert groups["merge_8/M21"] == groups["M"]
    assert groups["merge_8/Y"] != groups["merge_16/S"]
    quantizations = choose_quantizations(
        program,
        dict.fromkeys(program.tensors, 0.5),
        dict.fromkeys(program.tensors, INT8),
        ScaleRule.FLOAT,
        Requantize.MULTIPLIER,
    )
    assert quantizations["merge_8/S11"] == quantizations["merge_16/S"]


def test_one_must_lie_on_the_grid_that_a_residual_is_multiplied_by():
    program = block_merge(16, base=4)
    assert {"merge_8/S11", "merge_8/S22"} <= residual_partners(program)
    ranges = dict.fromkeys(program.tensors, 0.5)
    formats = dict.fromkeys(program.tensors, INT8)
    assert allows_multiplier(program, ranges, formats, ScaleRule.FLOAT)
    assert not allows_multiplier(program, ranges | {"base_4/power_2": 1e4}, formats, ScaleRule.FLOAT)
    doubling = neumann_doubling(16)
    wide = dict.fromkeys(doubling.tensors, 1e9)
    assert allows_multiplier(doubling, wide, dict.fromkeys(doubling.tensors, INT8), ScaleRule.FLOAT)
    assert not allows_multiplier(program, ranges, formats | {"base_4/power_2": INT8X2}, ScaleRule.FLOAT)


@pytest.mark.parametrize(
    ("limit", "legal"), [(0.05, False), (0.07, True), (1.0, True), (7.0, True), (15.0, False)]
)
def test_a_grid_that_holds_one_may_not_cost_more_than_1_db(limit, legal):
    program = block_merge(16, base=4)
    ranges = dict.fromkeys(program.tensors, limit)
    formats = dict.fromkeys(program.tensors, INT8)
    assert allows_multiplier(program, ranges, formats, ScaleRule.FLOAT) == legal


def test_products_that_vanish_get_room_for_their_partial_products():
    program = block_merge(16, base=4)
    ranges = dict.fromkeys(program.tensors, 0.5) | {"base_4/power_2": 1e-6}
    formats = dict.fromkeys(program.tensors, INT16)
    assert not allows_multiplier(program, ranges, formats, ScaleRule.FLOAT)
    held = hold_partial_products(program, ranges, formats)
    assert held == ranges | {"base_4/power_2": 0.5 * 0.5 / 16}
    assert allows_multiplier(program, held, formats, ScaleRule.FLOAT)
    assert hold_partial_products(program, ranges, dict.fromkeys(program.tensors, INT8)) == ranges


def test_no_room_is_made_at_the_cost_of_resolution():
    program = block_merge(16, base=4)
    ranges = dict.fromkeys(program.tensors, 5.0) | {"base_4/power_2": 1e-6}
    formats = dict.fromkeys(program.tensors, INT16)
    assert hold_partial_products(program, ranges, formats) == ranges
    assert not allows_multiplier(program, ranges, formats, ScaleRule.FLOAT)
