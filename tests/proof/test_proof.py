from __future__ import annotations

import math

import pytest
import torch

import qinvert
from qinvert.errors import PlanError
from qinvert.formats import INT4, INT8, INT8X2, INT16
from qinvert.methods import block_merge, neumann, neumann_doubling
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.steps import MatMul
from qinvert.stress import stress_matrices


def planned(program, steps=127, fmt=INT8, requantize=Requantize.DIVIDE, **tensors) -> LayerPlan:
    default = Quantization(format=fmt, scale=float32(1 / steps))
    quantizations = dict.fromkeys(program.tensors, default) | tensors
    return LayerPlan(program=program, tensors=quantizations, requantize=requantize)


@pytest.mark.parametrize(
    ("requantize", "fmt", "steps", "bound"),
    [
        (Requantize.DIVIDE, INT8, 127, 7 * 128 * 128),
        (Requantize.DIVIDE, INT4, 7, 7 * 7 * 7),
        (Requantize.MULTIPLIER, INT8, 127, 7 * 128 * 128 + 127 * 128),
        (Requantize.MULTIPLIER, INT4, 7, 7 * 7 * 7 + 7 * 7),
    ],
)
def test_the_widest_accumulator_is_that_of_the_last_merge(requantize, fmt, steps, bound):
    # Halves of 8 x 8, one factor strictly lower triangular: 7 products at most.
    proof = planned(block_merge(16, 1), steps, fmt, requantize).proof()
    assert proof.accumulator_bound == bound
    assert proof.accumulator_step in {"merge_16/Y", "merge_16/S21"}


@pytest.mark.parametrize(("requantize", "residuals"), [(Requantize.DIVIDE, 0), (Requantize.MULTIPLIER, 2)])
def test_residuals_widen_the_accumulator_of_the_multiplier_form_only(requantize, residuals):
    proof = planned(block_merge(16, 2, "masked"), requantize=requantize).proof()
    corrected = planned(block_merge(16, 2, corrections=1), requantize=requantize).proof()
    # Masks leave 7 of 16 products; where S is added, Y is zero, so only one residual counts.
    assert proof.accumulator_bound == 7 * 128 * 128 + min(residuals, 1) * 127 * 128
    assert corrected.accumulators["correction_1/R"] == 14 * 128 * 128 + residuals * 127 * 128


@pytest.mark.parametrize(("fmt", "exact"), [(INT8, True), (INT8X2, True), (INT16, False)], ids=str)
def test_emulation_in_float32_is_exact_below_two_to_the_24(fmt, exact):
    proof = planned(block_merge(16, 4), fmt.largest, fmt).proof()
    assert proof.exact_in_float32 is exact
    assert f"exact where emulated in float32: {'yes' if exact else 'no'}" in str(proof)


def test_the_smallest_scale_of_all_tensors_is_found():
    small = Quantization(format=INT16, scale=2.0**-30)
    proof = planned(block_merge(8, 4), **{"base_4/power_2": small}).proof()
    assert proof.smallest_scale == 2.0**-30
    assert "scales: at least 9.31e-10 (limit 1e-30)" in str(proof)


@pytest.mark.parametrize(("steps", "covered"), [(64, True), (127, True), (127.4, True), (127.6, False)])
def test_a_grid_covers_one_if_half_a_step_beyond_its_end_does(steps, covered):
    proof = planned(block_merge(8, 1), steps).proof()
    assert (not proof.may_saturate) is covered


def test_only_proved_tensors_can_be_missing_their_range():
    program = block_merge(8, 4)
    proof = planned(program, 200).proof()
    proved = ["M", *(step.output for step in program.steps if step.bound is not None)]
    assert "base_4/power_2" not in proved
    assert proof.bounded == len(proved)
    assert proof.may_saturate == dict.fromkeys(proved, pytest.approx(127 / 200))


def test_the_narrowest_tensor_is_named():
    tensors = {"merge_8/Y": Quantization(format=INT8, scale=float32(1 / 300))}
    proof = planned(block_merge(8, 1), 127, **tensors).proof()
    assert list(proof.may_saturate) == ["merge_8/Y"]
    covered = f"ranges: {proof.bounded - 1} of {proof.bounded} tensors with a proved range"
    assert covered in str(proof)
    assert "narrowest: merge_8/Y ends at 0.423" in str(proof)


def test_the_proof_tells_which_grids_clip_real_matrices():
    lower = stress_matrices("ones", 1, 8)
    for steps in (127, 200):
        plan = planned(block_merge(8, 1), steps)
        clipped = not torch.allclose(plan.inverse(lower), qinvert.exact_inverse(lower).float(), atol=1e-6)
        assert clipped is bool(plan.proof().may_saturate)


def test_a_program_without_products_has_no_accumulator():
    proof = planned(neumann(8, 1)).proof()
    assert (proof.accumulator_bound, proof.accumulator_step, proof.bounded) == (0, "none", 1)
    assert "at most 0 (none), fit int32 with 31 bits to spare" in str(proof)
    assert proof.exact_in_float32


def test_a_method_without_bounds_claims_none():
    plan = planned(neumann(8, 7))
    proof = plan.proof()
    assert (proof.bounded, proof.covered, proof.may_saturate) == (1, ("M",), {})
    assert proof.unproved == plan.program.tensors[1:]
    assert "ranges: 1 of 1 tensors" in str(proof)
    assert "no proof: 12 tensors rest on calibration, power_2 first" in str(proof)


def classes(proof):
    return [proof.cannot_saturate, proof.covered, tuple(proof.may_saturate), proof.partial, proof.unproved]


@pytest.mark.parametrize("limit", [None, 0.05, 1.0])
@pytest.mark.parametrize("steps", [64, 127, 200])
def test_every_tensor_is_in_one_class(limit, steps):
    plan = planned(block_merge(16, 4, corrections=1), steps)
    proof = plan.proof(limit)
    named = [name for names in classes(proof) for name in names]
    assert sorted(named) == sorted(plan.program.tensors)
    assert proof.limit == limit


def test_a_small_limit_proves_by_intervals_what_the_range_bound_cannot():
    plan = planned(block_merge(8, 4), 200)
    assert plan.proof().cannot_saturate == ()
    proof = plan.proof(limit=0.1)
    assert proof.cannot_saturate == plan.program.tensors
    assert classes(proof)[1:] == [(), (), (), ()]
    assert "saturation: impossible in 14 of 14 tensors, for |M| <= 0.1" in str(proof)
    assert "narrowest" not in str(proof)
    assert "no proof" not in str(proof)


@pytest.mark.parametrize(
    ("max_beta", "steps", "covered"), [(2, 64, False), (2, 63.5, True), (0.5, 200, True)]
)
def test_range_bounds_grow_with_beta(max_beta, steps, covered):
    proof = planned(block_merge(8, 1), steps).proof(max_beta=max_beta)
    assert (not proof.may_saturate) is covered
    assert f"(unit keys, beta <= {max_beta}, exact arithmetic)" in str(proof)


def test_headroom_is_counted_in_doublings():
    proof = planned(block_merge(16, 1)).proof()
    assert list(proof.headroom_bits) == list(proof.accumulators)
    for step, bits in proof.headroom_bits.items():
        assert proof.accumulators[step] << bits < 2**31 <= proof.accumulators[step] << (bits + 1)
    assert f"fit int32 with {min(proof.headroom_bits.values())} bits to spare" in str(proof)


@pytest.mark.parametrize("requantize", Requantize)
@pytest.mark.parametrize("program", [block_merge(16, 4, corrections=1), neumann(16, 5), neumann_doubling(16)])
def test_the_proved_width_never_exceeds_that_of_formats_and_shapes(program, requantize):
    plan = planned(program, requantize=requantize)
    accumulators = plan.proof().accumulators
    products = [step for step in program.steps if isinstance(step, MatMul)]
    assert list(accumulators) == [step.output for step in products]
    assert all(accumulators[step.output] <= plan.products[step.output].bound < 2**31 for step in products)


@pytest.mark.parametrize("limit", [1e-30, 1e30, math.inf])
def test_any_limit_gives_a_proof(limit):
    assert planned(block_merge(8, 4, corrections=1)).proof(limit).accumulator_bound < 2**17


@pytest.mark.parametrize("max_beta", [-1, math.nan, "2", None, True])
def test_beta_is_a_magnitude(max_beta):
    with pytest.raises(PlanError, match=r"max_beta .* is not a number of at least 0; pass the largest beta"):
        planned(block_merge(8, 4)).proof(max_beta=max_beta)


def test_a_proof_stays_short():
    text = str(planned(block_merge(64, 4, corrections=1), 200).proof())
    assert len(text.splitlines()) == 6
    assert max(map(len, text.splitlines())) < 140


@pytest.mark.parametrize("name", ["half_random", "repeated_keys", "negative_eigenvalues"])
def test_calibrated_int8_plans_are_exact_in_float32(name):
    plan = qinvert.calibrate(stress_matrices(name, 4, 32)).layer()
    assert plan.proof().exact_in_float32
    assert plan.proof().smallest_scale == min(q.scale for q in plan.tensors.values())
