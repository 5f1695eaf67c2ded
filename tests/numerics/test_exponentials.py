"""Grids on which every library's exp gives the same integers, against rational bounds of exp."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from qinvert.errors import PlanError
from qinvert.formats import INT4, INT8, INT16, UINT8
from qinvert.numerics import rounding, scalar
from qinvert.numerics.exponentials import MAX_ULPS, near_ties, safe_scale
from qinvert.numerics.scales import float32

INT8_ONE = float32(1 / 127)
#: A scale next to which some value of int16 lies on a tie of int8.
UNSAFE = float32(0.0003735632635653019)


def exact_exponential(x: Fraction, bits: int = 80) -> Fraction:
    """``exp(x)`` of ``x <= 0`` to within 2^-bits of itself, from the series of rational numbers."""
    halvings = max(0, (-x).__ceil__().bit_length() + 1)
    small, term, total = x / 2**halvings, Fraction(1), Fraction(1)
    for k in range(1, 40):
        term = Fraction(round(term * small / k * 2**160), 2**160)
        total += term
    for _ in range(halvings):
        total = Fraction(round(total * total * 2**160), 2**160)
    return total


@cache
def tied_integers(source: float, source_format, result: float, ulps: int) -> tuple[int, ...]:
    """Integers of the source whose exponential is within some units in the last place of a tie of int8."""
    found = []
    for q in range(source_format.minimum, 0):
        # Only the neighbourhood of ties needs exact numbers.
        steps = float(np.exp(np.float64(np.float32(q) * np.float32(source)))) / result
        if abs(steps % 1 - 0.5) > 1e-3 or steps > 127.4:
            continue
        value = exact_exponential(Fraction(float(np.float32(q) * np.float32(source))))
        ulp = Fraction(2) ** (int(np.frexp(float(value))[1]) - 24)
        low, high = (value + side * ulps * ulp for side in (-1, 1))
        if low / Fraction(result) <= Fraction(int(steps)) + Fraction(1, 2) <= high / Fraction(result):
            found.append(q)
    return tuple(found)


def test_the_oracle_is_the_exponential():
    for x in (Fraction(0), Fraction(-1), Fraction(-16), Fraction(-1, 1000)):
        assert float(exact_exponential(x)) == pytest.approx(float(np.exp(np.float64(x))), rel=1e-15)


@pytest.mark.parametrize("scale", [UNSAFE, float32(0.0008223604527302086), float32(2**-11), 0.125])
def test_what_is_safe_is_so_in_rational_arithmetic(scale):
    fmt = INT8 if scale == 0.125 else INT16
    # Two more units cover the rounding of exp and that of the division.
    wide, narrow = (len(tied_integers(scale, fmt, INT8_ONE, MAX_ULPS + more)) for more in (2, -2))
    assert narrow <= near_ties(scale, fmt, INT8_ONE, INT8) <= wide
    safe = safe_scale(scale, fmt, INT8_ONE, INT8)
    assert near_ties(safe, fmt, INT8_ONE, INT8) == 0
    assert tied_integers(safe, fmt, INT8_ONE, MAX_ULPS - 2) == ()


def test_a_scale_next_to_a_tie_is_found_and_moved_to_the_next_safe_one():
    assert near_ties(UNSAFE, INT16, INT8_ONE, INT8) == 1
    safe = safe_scale(UNSAFE, INT16, INT8_ONE, INT8)
    between = float(np.float32(UNSAFE))
    while between < safe:
        assert near_ties(between, INT16, INT8_ONE, INT8)
        between = float(np.nextafter(np.float32(between), np.float32(1)))
    assert between == safe
    assert safe_scale(safe, INT16, INT8_ONE, INT8) == safe


@given(
    scale=st.floats(2.0**-16, 2.0**-7, width=32),
    result=st.sampled_from([INT8_ONE, 2.0**-7, float32(1 / 100), float32(0.3)]),
    fmt=st.sampled_from([INT8, INT4, UINT8]),
)
def test_results_of_8_bits_have_a_safe_scale_nearby(scale, result, fmt):
    safe = safe_scale(scale, INT16, result, fmt)
    assert scale <= safe <= scale * (1 + 1e-4)


@settings(max_examples=15)
@given(scale=st.floats(2.0**-16, 2.0**-7, width=32), seed=st.integers(0, 2**32 - 1))
def test_libraries_that_are_a_few_units_off_agree_on_safe_scales(scale, seed):
    safe = safe_scale(scale, INT16, INT8_ONE, INT8)
    q = torch.arange(-(2**15), 1, dtype=torch.float32)
    expected = rounding.quantize_exponential(q * safe, INT8_ONE, INT8)
    other = np.exp((q * safe).numpy().astype(np.float64)).astype(np.float32)
    off = np.random.default_rng(seed).integers(-MAX_ULPS, MAX_ULPS + 1, other.shape)
    moved = np.maximum(other.view(np.int32) + off.astype(np.int32), 0).view(np.float32)
    other = np.where(other < 1, moved, other)
    assert torch.equal(rounding.quantize(torch.from_numpy(other), INT8_ONE, INT8), expected)


def test_results_of_16_bits_depend_on_the_library():
    assert near_ties(2**-11, INT16, 2**-15, INT16) > 1
    with pytest.raises(PlanError, match=r"no scale of int16 near .* use a result of 8 bits, or compare with"):
        safe_scale(2**-11, INT16, 2**-15, INT16)


@pytest.mark.parametrize("scales", [(0.1, INT8_ONE), (float32(0.1), 0.1), (-1.0, INT8_ONE), (1.0, 0.0)])
def test_scales_are_checked(scales):
    with pytest.raises(PlanError, match="is not a float32 in"):
        near_ties(scales[0], INT16, scales[1], INT8)


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_onnxruntime_gives_the_integers_of_the_simulator_on_safe_scales(shift):
    scale = safe_scale(float32(16 / 2**15 / (1 + shift / 7)), INT16, INT8_ONE, INT8)
    x = np.arange(-(2**15), 1, dtype=np.float32) * np.float32(scale)
    nodes = [
        helper.make_node("Exp", ["x"], ["e"]),
        helper.make_node("QuantizeLinear", ["e", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "exponential",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT8, x.shape)],
        [
            helper.make_tensor("s", TensorProto.FLOAT, [], [INT8_ONE]),
            helper.make_tensor("z", TensorProto.INT8, [], [0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    expected = rounding.quantize_exponential(torch.from_numpy(x), INT8_ONE, INT8)
    assert np.array_equal(found, expected.numpy())
    assert not near_ties(scale, INT16, INT8_ONE, INT8)


@given(
    x=st.floats(-100, 0, width=32),
    scale=st.floats(2.0**-20, 2.0, width=32),
    fmt=st.sampled_from([INT4, INT8, INT16]),
)
def test_the_scalar_twin_of_the_exponential_is_the_vector(x, scale, fmt):
    vector = rounding.quantize_exponential(torch.tensor([x], dtype=torch.float32), scale, fmt)
    expected = scalar.quantize_exponential_scalar(x, scale, fmt)
    assert int(vector[0]) == expected
    # Once more from rational numbers: half a unit of float32 and the division are all that rounds.
    steps = float(exact_exponential(Fraction(x))) / scale
    assert abs(min(steps, fmt.maximum) - expected) <= 0.5 + steps * 2.0**-22
