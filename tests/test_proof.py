from __future__ import annotations

import pytest
import torch

import qinvert
from qinvert.arithmetic import float32
from qinvert.formats import INT4, INT8, INT16
from qinvert.methods import block_merge, neumann
from qinvert.plan import LayerPlan, Quantization, Requantize
from qinvert.stress import stress_matrices


def planned(program, steps=127, fmt=INT8, requantize=Requantize.DIVIDE, **tensors) -> LayerPlan:
    default = Quantization(format=fmt, scale=float32(1 / steps))
    quantizations = dict.fromkeys(program.tensors, default) | tensors
    return LayerPlan(program=program, tensors=quantizations, requantize=requantize)


@pytest.mark.parametrize(
    ("requantize", "fmt", "steps", "bound"),
    [
        (Requantize.DIVIDE, INT8, 127, 8 * 128 * 128),
        (Requantize.DIVIDE, INT4, 7, 8 * 7 * 7),
        (Requantize.MULTIPLIER, INT8, 127, 8 * 128 * 128 + 127 * 128),
        (Requantize.MULTIPLIER, INT4, 7, 8 * 7 * 7 + 7 * 7),
    ],
)
def test_the_widest_accumulator_is_that_of_the_last_merge(requantize, fmt, steps, bound):
    proof = planned(block_merge(16, 1), steps, fmt, requantize).proof()
    assert proof.accumulator_bound == bound
    assert proof.accumulator_step in {"merge_16/Y", "merge_16/S21"}


@pytest.mark.parametrize(("requantize", "residuals"), [(Requantize.DIVIDE, 0), (Requantize.MULTIPLIER, 2)])
def test_residuals_widen_the_accumulator_of_the_multiplier_form_only(requantize, residuals):
    proof = planned(block_merge(16, 2, "masked"), requantize=requantize).proof()
    assert proof.accumulator_bound == 16 * 128 * 128 + residuals * 127 * 128


@pytest.mark.parametrize(("chunk", "exact"), [(512, True), (1024, False)])
def test_emulation_in_float32_is_exact_below_two_to_the_24(chunk, exact):
    proof = planned(block_merge(chunk, 4, "masked")).proof()
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
    proved = [step.output for step in program.steps if step.bound is not None]
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
    assert (proof.accumulator_bound, proof.accumulator_step, proof.bounded) == (0, "none", 0)
    assert proof.exact_in_float32


def test_a_method_without_bounds_claims_none():
    proof = planned(neumann(8, 7)).proof()
    assert (proof.bounded, proof.may_saturate) == (0, {})
    assert "ranges: 0 of 0 tensors" in str(proof)


@pytest.mark.parametrize("name", ["half_random", "repeated_keys", "negative_eigenvalues"])
def test_calibrated_int8_plans_are_exact_in_float32(name):
    plan = qinvert.calibrate(stress_matrices(name, 4, 32)).layer()
    assert plan.proof().exact_in_float32
    assert plan.proof().smallest_scale == min(q.scale for q in plan.tensors.values())
