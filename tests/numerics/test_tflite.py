"""TFLite's rounding: twins, gemmlowp's own definition, and what the reference kernels returned."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qinvert
from qinvert.errors import PlanError
from qinvert.execution.simulator import simulate_integers
from qinvert.execution.tflite import check_plan
from qinvert.formats import INT4, INT8
from qinvert.numerics import tflite
from qinvert.numerics.law import Rounding
from qinvert.numerics.scales import float32
from qinvert.program.steps import Add
from qinvert.stress import STRESS, stress_matrices
from qinvert.systems import Systems

ACCUMULATORS = st.integers(-(2**22), 2**22)
MULTIPLIERS = st.floats(2.0**-20, 4.0)
SCALES = st.floats(2.0**-14, 2.0**4, width=32)
FORMATS = st.sampled_from([INT8, INT4])
INTEGERS = st.integers(-128, 127)


def saturating_rounding_doubling_high_mul(a, b):
    nudge = 2**30 if a * b >= 0 else 1 - 2**30
    total = a * b + nudge
    # C divides towards zero.
    return total // 2**31 if total >= 0 else -(-total // 2**31)


def rounding_divide_by_power_of_two(x, exponent):
    mask = 2**exponent - 1
    threshold = (mask >> 1) + (x < 0)
    return (x >> exponent) + ((x & mask) > threshold)


def multiply_by_quantized_multiplier(x, multiplier):
    """As gemmlowp and TFLite define it, in 32-bit integers."""
    mantissa, shift = math.frexp(multiplier)
    quantized = math.floor(mantissa * 2**31 + 0.5)
    if quantized == 2**31:
        quantized, shift = quantized // 2, shift + 1
    left, right = max(shift, 0), max(-shift, 0)
    return rounding_divide_by_power_of_two(
        saturating_rounding_doubling_high_mul(x * 2**left, quantized), right
    )


@given(value=ACCUMULATORS, multiplier=MULTIPLIERS)
def test_scaled_is_gemmlowps(value, multiplier):
    assert tflite.scaled_scalar(value, multiplier) == multiply_by_quantized_multiplier(value, multiplier)


@given(values=st.lists(ACCUMULATORS, min_size=1, max_size=8), multiplier=MULTIPLIERS)
def test_scaled_equals_its_twin(values, multiplier):
    found = tflite.scaled(torch.tensor(values), multiplier)
    assert found.tolist() == [tflite.scaled_scalar(value, multiplier) for value in values]


@pytest.mark.parametrize("kind", ["requantize", "multiply"])
@given(
    accumulators=st.lists(ACCUMULATORS, min_size=1, max_size=8),
    multiplier=MULTIPLIERS,
    scale=SCALES,
    fmt=FORMATS,
)
def test_a_product_equals_its_twin(kind, accumulators, multiplier, scale, fmt):
    unit, twin = float32(multiplier * scale), getattr(tflite, f"{kind}_scalar")
    found = getattr(tflite, kind)(torch.tensor(accumulators, dtype=torch.float32), unit, scale, fmt)
    assert found.tolist() == [twin(a, unit, scale, fmt) for a in accumulators]


@given(
    pairs=st.lists(st.tuples(INTEGERS, INTEGERS), min_size=1, max_size=8),
    scales=st.tuples(SCALES, SCALES, SCALES),
    fmt=FORMATS,
)
def test_add_equals_its_twin_and_is_near_the_sum(pairs, scales, fmt):
    first, second, scale = scales
    left, right = (torch.tensor(part, dtype=torch.float32) for part in zip(*pairs, strict=True))
    found = tflite.add([(left, first), (right, second)], scale, fmt).tolist()
    assert found == [tflite.add_scalar([(a, first), (b, second)], scale, fmt) for a, b in pairs]
    for result, (a, b) in zip(found, pairs, strict=True):
        exact = min(max((a * first + b * second) / scale, fmt.minimum), fmt.maximum)
        # A shifted term is wrong by less than a unit of 2^-19 of the largest scale.
        assert abs(result - exact) <= 0.5 + 2.0**-17 * max(1.0, first / scale, second / scale)


@given(a=INTEGERS, b=INTEGERS, scale=SCALES)
def test_a_sum_on_one_grid_is_exact(a, b, scale):
    assert tflite.add_scalar([(a, scale), (b, scale)], scale, INT8) == min(max(a + b, -128), 127)


@given(accumulator=ACCUMULATORS, multiplier=st.floats(2.0**-20, 1.0))
def test_a_result_stays_near_the_product(accumulator, multiplier):
    exact = accumulator * multiplier
    error = abs(tflite.scaled_scalar(accumulator, multiplier) - exact)
    # The first rounding is worth half of an integer that the second divides by 2^-e.
    _, exponent = math.frexp(multiplier)
    assert error <= 0.5 + 2.0 ** (exponent - 1) + abs(exact) * 2.0**-30


@given(k=st.integers(1, 127), m=st.integers(1, 127))
def test_an_identity_stays_one(k, m):
    # The diagonal of (A + kI) (B + mI) is k m, and k the integer of 1.0 on the result's grid.
    one, scale = float32(1 / k), float32(1 / m)
    assert tflite.requantize_scalar(k * m, float32(one * scale), one, INT8) == k


@given(q=INTEGERS, scale=SCALES)
def test_a_mask_of_ones_changes_nothing(q, scale):
    assert tflite.multiply_scalar(q, scale, scale, INT8) == q


@pytest.mark.parametrize(
    ("accumulator", "scales", "wanted"),
    [
        # Measured: 43 / 87 rounds to 1/2 first, 31 / 64 as well, and 32 / 64 is a tie.
        (43, (1 / 87, 1 / 87, 1 / 87), 1), (-43, (1 / 87, 1 / 87, 1 / 87), -1),
        (1000, (1 / 87, 1 / 87, 1 / 87), 12), (130, (1 / 87, 1 / 87, 1 / 87), 2),
        (21, (1 / 87, 1 / 87, 1 / 87), 0), (31, (1 / 64, 1 / 32, 1 / 32), 1),
        (32, (1 / 64, 1 / 32, 1 / 32), 1), (-32, (1 / 64, 1 / 32, 1 / 32), -1),
        (95, (1 / 64, 1 / 32, 1 / 32), 2), (-96, (1 / 87, 1 / 29, 1 / 41), -2),
        (21, (1 / 2, 1 / 4, 1 / 32), 84), (-130, (1 / 2, 1 / 4, 1 / 32), -128),
    ],
)  # fmt: skip
def test_measured_products(accumulator, scales, wanted):
    left, right, scale = (float32(value) for value in scales)
    assert tflite.requantize_scalar(accumulator, float32(left * right), scale, INT8) == wanted


def planned(sets=tuple(STRESS), **options):
    lower = torch.cat([stress_matrices(name, 2, 16, seed=3) for name in sets])
    defaults = {"method": qinvert.block_merge(16, base=4), "bits": 8, "min_sqnr_db": 0}
    return lower, qinvert.calibrate(lower, **defaults | options)


def test_a_plan_differs_by_little_and_not_by_nothing():
    lower, plan = planned()
    layer = plan.layer()
    ours = simulate_integers(layer, Systems(lower=lower))
    theirs = simulate_integers(layer, Systems(lower=lower), rounding=Rounding.TFLITE)
    steps = (ours - theirs).abs()
    assert 0 < float(steps.max()) <= 4
    assert float((steps > 0).double().mean()) < 0.05


def test_simulate_takes_the_rounding():
    lower, plan = planned()
    (ours,) = qinvert.simulate(plan, lower).layers.values()
    (theirs,) = qinvert.simulate(plan, lower, rounding="tflite").layers.values()
    assert ours.sqnr_db != theirs.sqnr_db
    assert math.isclose(ours.sqnr_db, theirs.sqnr_db, abs_tol=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "int-ops"}, "do not join the residual terms"),
        ({"bits": 16}, "is int16"),
    ],
)
def test_plans_whose_rounding_is_not_known_are_refused(options, words):
    lower, plan = planned(**options)
    with pytest.raises(PlanError, match=words):
        plan.layer().inverse(lower, rounding="tflite")


def test_sums_on_grids_that_lie_too_far_apart_are_refused():
    _, plan = planned(method=qinvert.block_merge(16, base=4, corrections=1), scales="float")
    layer = plan.layer()
    (total,) = [step.output for step in layer.program.steps if isinstance(step, Add)]
    grid = layer.tensors[total]
    fine = {**layer.tensors, total: replace(grid, scale=float32(grid.scale * 2.0**-21))}
    check_plan(layer)
    with pytest.raises(PlanError, match=rf"does not sum on the grids of step '{total}'"):
        check_plan(replace(layer, tensors=fine))
