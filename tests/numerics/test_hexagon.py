"""Hexagon's rounding: twins, properties, and what the emulator returned for single products."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qinvert
from qinvert.errors import PlanError
from qinvert.execution.hexagon import check_plan
from qinvert.execution.simulator import simulate_integers
from qinvert.formats import INT4, INT8
from qinvert.numerics import hexagon
from qinvert.numerics.law import Rounding
from qinvert.stress import STRESS, stress_matrices
from qinvert.systems import Systems

ACCUMULATORS = st.integers(-(2**22), 2**22)
MULTIPLIERS = st.floats(2.0**-20, 4.0)
FORMATS = st.sampled_from([INT8, INT4])


@given(accumulators=st.lists(ACCUMULATORS, min_size=1, max_size=8), multiplier=MULTIPLIERS, fmt=FORMATS)
def test_requantize_equals_its_twin(accumulators, multiplier, fmt):
    found = hexagon.requantize(torch.tensor(accumulators, dtype=torch.float32), multiplier, fmt)
    assert found.tolist() == [hexagon.requantize_scalar(a, multiplier, fmt) for a in accumulators]


@given(
    values=st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=8),
    scale=st.floats(*hexagon.SCALES, width=32),
    fmt=FORMATS,
)
def test_quantize_equals_its_twin(values, scale, fmt):
    found = hexagon.quantize(torch.tensor(values, dtype=torch.float32), scale, fmt)
    assert found.tolist() == [hexagon.quantize_scalar(x, scale, fmt) for x in values]


@given(accumulator=ACCUMULATORS, multiplier=MULTIPLIERS)
def test_a_result_stays_near_the_product(accumulator, multiplier):
    exact = accumulator * multiplier
    nearest = min(max(exact, -128), 127)
    error = abs(hexagon.requantize_scalar(accumulator, multiplier, INT8) - nearest)
    assert error <= 0.5 + 2.0**-4 + abs(exact) * 2.0**-12 or abs(exact) > 128


@given(
    pairs=st.lists(st.tuples(st.integers(-128, 127), st.integers(-128, 127)), min_size=1, max_size=8),
    exponents=st.lists(st.integers(-14, 14), min_size=3, max_size=3),
    fmt=FORMATS,
)
def test_add_equals_its_twin_and_rounds_ties_up(pairs, exponents, fmt):
    first, second, scale = (2.0**e for e in exponents)
    left, right = (torch.tensor(part, dtype=torch.float32) for part in zip(*pairs, strict=True))
    found = hexagon.add([(left, first), (right, second)], scale, fmt).tolist()
    assert found == [hexagon.add_scalar([(a, first), (b, second)], scale, fmt) for a, b in pairs]
    assert hexagon.add_scalar([(1, 1.0), (0, 1.0)], 2.0, fmt) == 1
    assert hexagon.add_scalar([(-1, 1.0), (0, 1.0)], 2.0, fmt) == 0


@given(k=st.integers(1, 127), m=st.integers(1, 127))
def test_an_identity_stays_one(k, m):
    # The diagonal of (A + kI) (B + mI) is k m, and k the integer of 1.0 on the result's grid.
    assert hexagon.requantize_scalar(k * m, 1 / m, INT8) == k


@pytest.mark.parametrize(
    ("accumulator", "multiplier", "wanted"),
    [
        # Measured on v73: multiples of 8 are the thresholds of 1/87, and ties of 1/64 go up.
        (39, 1 / 87, 0), (40, 1 / 87, 1), (567, 1 / 87, 6), (568, 1 / 87, 7), (-481, 1 / 87, -6),
        (-480, 1 / 87, -5), (32, 1 / 64, 1), (-32, 1 / 64, 0), (96, 1 / 64, 2), (-96, 1 / 64, -1),
        (31, 1 / 64, 0), (10**6, 1 / 64, 127), (-(10**6), 1 / 64, -128),
    ],
)  # fmt: skip
def test_measured_products(accumulator, multiplier, wanted):
    assert hexagon.requantize_scalar(accumulator, multiplier, INT8) == wanted


@pytest.mark.parametrize(
    ("value", "scale", "wanted"),
    # Measured: -0.09765625 is -8.496 steps of 1/87, and -8.5 in float16.
    [(-0.09765625, 1 / 87, -9), (0.0703125, 1 / 64, 5), (-0.1015625, 1 / 64, -7), (9.0, 1 / 64, 127)],
)
def test_measured_inputs(value, scale, wanted):
    assert hexagon.quantize_scalar(value, scale, INT8) == wanted


def planned(sets=tuple(STRESS), **options):
    lower = torch.cat([stress_matrices(name, 2, 16, seed=3) for name in sets])
    defaults = {"method": qinvert.block_merge(16, base=4), "bits": 8, "min_sqnr_db": 0}
    return lower, qinvert.calibrate(lower, **defaults | options)


def test_a_plan_differs_by_little_and_not_by_nothing():
    lower, plan = planned()
    layer = plan.layer()
    ours, theirs = layer.inverse(lower), layer.inverse(lower, rounding="hexagon")
    steps = ((ours - theirs).abs() / layer.output.scale).round()
    assert 0 < float(steps.max()) <= 8
    assert float((steps > 0).double().mean()) < 0.05
    integers = simulate_integers(layer, Systems(lower=lower), rounding=Rounding.HEXAGON)
    assert np.array_equal(integers.numpy(), (theirs - torch.eye(16)).div(layer.output.scale).round().numpy())


def test_simulate_takes_a_rounding():
    lower, plan = planned()
    (ours,) = qinvert.simulate(plan, lower).layers.values()
    (theirs,) = qinvert.simulate(plan, lower, rounding="hexagon").layers.values()
    assert ours.sqnr_db != theirs.sqnr_db
    assert math.isclose(ours.sqnr_db, theirs.sqnr_db, abs_tol=2)
    with pytest.raises(PlanError, match="rounding 'moon' is unknown; use onnx, hexagon or tflite"):
        qinvert.simulate(plan, lower, rounding="moon")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "int-ops"}, "joins the residual terms"),
        ({"bits": 16}, "is int16"),
        ({"method": "neumann", "sets": ["independent_keys"], "scales": "float"}, "how Hexagon rounds step"),
    ],
)
def test_plans_whose_rounding_is_not_known_are_refused(options, words):
    lower, plan = planned(**options)
    with pytest.raises(PlanError, match=words):
        plan.layer().inverse(lower, rounding="hexagon")


def test_scales_beyond_float16_are_refused():
    _, plan = planned()
    layer = plan.layer()
    tiny = {name: replace(q, scale=q.scale * 2.0**-12) for name, q in layer.tensors.items()}
    with pytest.raises(PlanError, match="is beyond float16"):
        check_plan(replace(layer, tensors=tiny))


@pytest.mark.parametrize("odd", [4097, 4101, 5001, 6001, 7001])
def test_ties_of_the_factor_go_up(odd):
    # Measured on v81: to even, up to 2 % of random products would differ.
    factor, _ = hexagon.factor_of(odd / 2**13)
    assert factor == (odd + 1) / 2**13
