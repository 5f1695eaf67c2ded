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
from qinvert.export.interface import Interface
from qinvert.export.verification.references import reference
from qinvert.formats import INT4, INT8, INT16_WHOLE, UINT16
from qinvert.methods import elimination
from qinvert.numerics import hexagon
from qinvert.numerics.law import Rounding
from qinvert.numerics.scales import float32, multiplier
from qinvert.program.residual_sums import residuals_as_sums
from qinvert.stress import STRESS, stress_matrices
from qinvert.systems import Systems

ACCUMULATORS = st.integers(-(2**22), 2**22)
MULTIPLIERS = st.floats(2.0**-20, 4.0)
FORMATS = st.sampled_from([INT8, INT4])
WIDE = st.integers(-(2**15), 2**15 - 1)


@given(accumulators=st.lists(ACCUMULATORS, min_size=1, max_size=8), multiplier=MULTIPLIERS, fmt=FORMATS)
def test_requantize_equals_its_twin(accumulators, multiplier, fmt):
    found = hexagon.requantize(torch.tensor(accumulators, dtype=torch.float32), multiplier, fmt)
    assert found.tolist() == [hexagon.requantize_scalar(a, multiplier, fmt) for a in accumulators]


@given(accumulators=st.lists(ACCUMULATORS, min_size=1, max_size=8), multiplier=MULTIPLIERS)
def test_wide_requantize_equals_its_twin(accumulators, multiplier):
    found = hexagon.requantize(torch.tensor(accumulators, dtype=torch.float32), multiplier, INT16_WHOLE)
    assert found.tolist() == [hexagon.requantize_scalar(a, multiplier, INT16_WHOLE) for a in accumulators]


@given(
    pairs=st.lists(st.tuples(WIDE, WIDE), min_size=1, max_size=8), fmt=st.sampled_from([INT16_WHOLE, INT8])
)
def test_cut_equals_its_twin_which_multiplies_unsigned_integers(pairs, fmt):
    left, right = [a for a, _ in pairs], [max(min(b, fmt.maximum), fmt.minimum) for _, b in pairs]
    assert cut(left, right, fmt) == hexagon.cut_scalar(left, right, fmt)


def cut(left, right, fmt):
    """The accumulator of one row and one column, as tensors."""
    column = hexagon.clamped(torch.tensor(right, dtype=torch.float64), fmt)
    total = (torch.tensor(left, dtype=torch.float64) * column).sum()
    return hexagon.cut(total, column.sum(), fmt).item()


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
    ("fmt", "left", "right", "wanted"),
    [
        # Measured on v73 and v81, onnxruntime-qnn 2.7: products of three, on the scales below.  A row of
        # zeros gives -1 where the sum of a column is odd, and 32767 enters as 32639.
        (INT16_WHOLE, [0, 0, 0], [21676, 19065, 22567], 0),
        (INT16_WHOLE, [0, 0, 0], [-32001, -5729, 7943], -1),
        (INT16_WHOLE, [20181, -2042, 1004], [32767, 12931, -31450], 5832),
        (INT16_WHOLE, [8535, -14038, 31426], [32767, 12931, -31450], -8653),
        (INT16_WHOLE, [-29801, -32702, -29573], [-27953, -23001, 6422], 13545),
        (INT16_WHOLE, [31076, -21121, 26062], [12605, 15369, -7808], -1325),
        (INT8, [0, 0, 0], [3, 121, 5], 0),
        (INT8, [-764, -30916, 27685], [127, -76, 49], 9124),
        (INT8, [-11545, 30389, -26688], [-41, 18, 60], -1469),
        (INT8, [-28808, -31372, -18701], [-33, -76, -124], 14294),
    ],
)  # fmt: skip
def test_measured_products_of_16_bits(fmt, left, right, wanted):
    scale = 3e-5 if fmt is INT16_WHOLE else 2.0**-7
    factor = multiplier(float32(2e-5), float32(scale), float32(0.61803398875e-4)) * 2.0 ** hexagon.cut_bits(
        fmt
    )
    assert hexagon.requantize_scalar(hexagon.cut_scalar(left, right, fmt), factor, INT16_WHOLE) == wanted
    found = hexagon.requantize(torch.tensor(cut(left, right, fmt)), factor, INT16_WHOLE)
    assert found.item() == wanted


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


def wide_plan(**options):
    wide = {"bits": 16, "target": "hexagon-int16", "sets": ["independent_keys"]}
    return planned(**wide | {"method": residuals_as_sums(elimination(16))} | options)


def test_a_plan_of_16_bits_loses_what_the_accumulators_do():
    lower, plan = wide_plan()
    (ours,) = qinvert.simulate(plan, lower).layers.values()
    (theirs,) = qinvert.simulate(plan, lower, rounding="hexagon").layers.values()
    # An accumulator step is several steps of the result, and the cut is never upwards.
    assert 10 < ours.sqnr_db - theirs.sqnr_db < 40


def test_residual_terms_in_accumulators_of_16_bits_are_refused():
    lower, plan = wide_plan(method=elimination(16))
    with pytest.raises(PlanError, match="how Hexagon rounds step"):
        plan.layer().inverse(lower, rounding="hexagon")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"input": "M", "input_type": "integers", "output": "integers"}, Rounding.HEXAGON),
        ({"input": "M", "output": "integers"}, Rounding.ONNX),
        ({"input": "M", "input_type": "integers"}, Rounding.ONNX),
    ],
)
def test_16_bits_are_known_between_integers_only(options, wanted):
    lower, plan = wide_plan()
    found = reference(
        plan.layer(), Interface(**options), UINT16, Systems(lower=lower), rounding=Rounding.HEXAGON
    )
    assert found.rounding is wanted
