from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inverse_programs import inverse_program

import qinvert
from qinvert.errors import InputError, PlanError
from qinvert.formats import INT4, INT8, INT8X2, INT16, UINT8
from qinvert.methods import block_merge
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import MATRIX
from qinvert.program.program import Program
from qinvert.program.steps import MatMul, Rescale
from qinvert.stress import stress_matrices


def grid(steps: int = 127, fmt=INT8) -> Quantization:
    return Quantization(format=fmt, scale=float32(1 / steps))


def square(*add: str) -> Program:
    copy = Rescale(output="copy", source=MATRIX)
    product = MatMul(output="product", left=MATRIX, right="copy", add=add)
    return inverse_program(copy, product, name="square", chunk=8)


def planned(program: Program, requantize=Requantize.DIVIDE, default=None, **tensors) -> LayerPlan:
    quantizations = dict.fromkeys(program.tensors, default or grid()) | tensors
    return LayerPlan(program=program, tensors=quantizations, requantize=requantize)


@pytest.fixture(scope="module")
def calibrated() -> LayerPlan:
    return qinvert.calibrate(stress_matrices("half_random", 4, 8), method=block_merge(8)).layer()


def test_a_calibrated_plan_quantizes_every_tensor_and_no_other(calibrated):
    assert set(calibrated.tensors) == set(calibrated.program.tensors)
    assert calibrated.input == calibrated.tensors["M"]
    assert calibrated.output == calibrated.tensors["merge_8/S"]
    assert calibrated.chunk == 8


@pytest.mark.parametrize("made_anew", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_copies_and_pickles_of_plans_are_the_same_plan(calibrated, tmp_path, made_anew):
    plan = Plan(layers={"a": calibrated}, target="int-ops", provenance={"seed": 1})
    found = made_anew(plan)
    for each, name in ((plan, "first"), (found, "second")):
        each.save(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    with pytest.raises(TypeError):
        found.layers["other"] = found.layer()


@pytest.mark.parametrize("scales", ["float", "pow2"])
@pytest.mark.parametrize("target", ["npu-qdq-int8", "int-ops"])
@pytest.mark.parametrize("method", ["block_merge", "neumann_doubling", "auto"])
def test_calibrated_plans_can_be_built_again_from_their_parts(scales, target, method):
    lower = stress_matrices("correlated_keys", 4, 16)
    plan = qinvert.calibrate(lower, method=method, scales=scales, target=target).layer()
    again = LayerPlan(program=plan.program, tensors=dict(plan.tensors), requantize=plan.requantize)
    assert torch.equal(again.inverse(lower), plan.inverse(lower))


def test_a_missing_tensor_is_named(calibrated):
    rest = {name: q for name, q in calibrated.tensors.items() if name != "merge_8/Y"}
    with pytest.raises(PlanError, match=r"does not match its program block_merge\(.*: it lacks 'merge_8/Y'"):
        replace(calibrated, tensors=rest)


def test_a_surplus_tensor_is_named(calibrated):
    with pytest.raises(PlanError, match="it has 'extra', which no step writes; calibrate again"):
        replace(calibrated, tensors={**calibrated.tensors, "extra": grid()})


def test_formats_with_a_zero_point_are_refused():
    with pytest.raises(PlanError, match=r"'copy': format uint8 has a zero point.*int8x2 or int16"):
        planned(square(), copy=grid(fmt=UINT8))


def test_two_planes_need_the_divide_form():
    assert planned(square(), copy=grid(fmt=INT8X2)).tensors["copy"].format is INT8X2
    assert planned(square(), Requantize.MULTIPLIER, copy=grid(fmt=INT16)).tensors["copy"].format is INT16
    with pytest.raises(PlanError, match="'copy': one factor per product cannot requantize int8x2"):
        planned(square(), Requantize.MULTIPLIER, copy=grid(fmt=INT8X2))


@pytest.mark.parametrize("name", ["base_4/M_0", "merge_8/S21", "merge_8/S", "M"])
@pytest.mark.parametrize("other", [grid(91), grid(127, INT4)], ids=str)
def test_tensors_joined_by_moves_share_a_quantization(name, other):
    with pytest.raises(PlanError, match=r"without rounding, but has .*; give both one quantization"):
        planned(block_merge(8), **{name: other})


def test_tensors_that_no_move_joins_are_free():
    assert planned(block_merge(8), **{"merge_8/Y": grid(91)}).tensors["merge_8/Y"] == grid(91)


def test_an_int16_product_splits_its_right_operand_and_overflows_only_at_512():
    step = square().steps[1]
    assert planned(square(), default=grid(fmt=INT16)).products[step.output].bound == 8 * 2**15 * 2**7
    wide = block_merge(1024)
    with pytest.raises(PlanError, match=f"can reach {2**31}, but this target's hold less than {2**31}"):
        planned(wide, default=grid(fmt=INT16))


def test_a_residual_can_overflow_int32_only_as_an_integer_of_the_accumulator():
    fine = grid(2**24)
    assert planned(square("copy"), M=fine).products["product"].bound == 8 * 128**2
    with pytest.raises(PlanError, match=r"can reach .* use a narrower format or a larger scale"):
        planned(square("copy"), Requantize.MULTIPLIER, M=fine)


@pytest.mark.parametrize(
    ("left", "right", "add", "requantize", "bound"),
    [
        (grid(), grid(), (), Requantize.DIVIDE, 8 * 128 * 128),
        (grid(), grid(), ("M", "copy"), Requantize.DIVIDE, 8 * 128 * 128),
        (grid(), grid(), ("copy",), Requantize.MULTIPLIER, 8 * 128 * 128 + 127 * 128),
        (grid(91), grid(77), ("copy",), Requantize.MULTIPLIER, 8 * 128 * 128 + 91 * 128),
        (grid(91), grid(77), ("M", "copy"), Requantize.MULTIPLIER, 8 * 128 * 128 + (91 + 77) * 128),
        (grid(91, INT4), grid(77), ("copy",), Requantize.MULTIPLIER, 8 * 7 * 128 + 91 * 128),
        (grid(91, INT16), grid(77, INT8), ("M",), Requantize.DIVIDE, 8 * 2**15 * 2**7),
        (grid(91, INT8), grid(77, INT16), ("M",), Requantize.DIVIDE, 8 * 2**14),
        (grid(91, INT8X2), grid(77, INT8X2), (), Requantize.DIVIDE, 2 * 8 * 2**14),
        (grid(91, INT8X2), grid(77, INT4), (), Requantize.DIVIDE, 8 * 128 * 7),
    ],
)
def test_the_accumulator_bound_is_the_worst_case_of_all_integers(left, right, add, requantize, bound):
    plan = planned(square(*add), requantize, M=left, copy=right)
    assert plan.products[plan.program.steps[1].output].bound == bound


@given(st.integers(1, 2**22))
def test_an_identity_on_a_reciprocal_grid_is_that_integer(k):
    plan = planned(square("copy"), M=grid(k))
    assert plan.products[plan.program.steps[1].output].identity("copy") == k


@pytest.mark.parametrize("scale", [2.0, 0.75, float32(0.3), float32(1 / 127 * 1.001), 2.0**30])
def test_an_identity_that_is_no_integer_is_refused_by_the_multiplier_form_only(scale):
    coarse = Quantization(format=INT8, scale=scale)
    planned(square("copy"), Requantize.DIVIDE, M=coarse)
    with pytest.raises(PlanError, match=r"1\.0 is not an integer on the grid of 'M' .*use a scale 1/k or"):
        planned(square("copy"), Requantize.MULTIPLIER, M=coarse)


def test_a_residual_that_is_no_operand_is_refused_by_the_multiplier_form_only():
    other = Rescale(output="other", source=MATRIX)
    product = MatMul(output="product", left=MATRIX, right=MATRIX, subtract=("other",))
    program = inverse_program(other, product, chunk=8)
    planned(program, Requantize.DIVIDE)
    with pytest.raises(PlanError, match=r"residual 'other' is not an operand.*requantize='divide'"):
        planned(program, Requantize.MULTIPLIER)


def test_a_requantize_form_given_by_its_name_means_that_form():
    assert planned(square("copy"), "multiplier").requantize is Requantize.MULTIPLIER


def test_a_plan_keeps_its_own_quantizations():
    tensors = dict.fromkeys(square().tensors, grid())
    plan = LayerPlan(program=square(), tensors=tensors, requantize=Requantize.DIVIDE)
    tensors["product"] = grid(3)
    assert plan.output == grid()
    with pytest.raises(TypeError):
        plan.tensors["product"] = grid(3)


def test_mixed_formats_are_listed():
    assert planned(square(), copy=grid(7, INT4)).formats == "int8+int4"
    assert str(planned(square())) == "square(chunk=8) int8, requantize by divide"


def test_the_inverse_comes_as_float32_in_the_container_that_was_given(calibrated):
    lower = stress_matrices("half_random", 6, 8).double().reshape(2, 3, 8, 8)
    tensor, array = calibrated.inverse(lower), calibrated.inverse(lower.numpy())
    assert (tensor.dtype, tensor.shape) == (torch.float32, lower.shape)
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    assert np.array_equal(array, tensor)


def test_the_inverse_refuses_other_sizes(calibrated):
    with pytest.raises(InputError, match="L is 16 x 16, but the plan is for 8 x 8"):
        calibrated.inverse(torch.zeros(16, 16))


def test_the_only_layer_needs_no_name(calibrated):
    plan = Plan(layers={"a": calibrated}, target="npu-qdq-int8")
    assert plan.layer() is plan.layer("a") is calibrated
    assert str(plan) == f"a: {calibrated}"


@pytest.mark.parametrize(("name", "given"), [(None, "no layer is named"), ("x", "unknown layer 'x'")])
def test_an_unknown_layer_lists_the_first_ones(calibrated, name, given):
    plan = Plan(layers={f"layer_{i}": calibrated for i in range(10)}, target="npu-qdq-int8")
    with pytest.raises(PlanError, match=f"{given}; the plan has layer_0, .*, layer_7 and 2 more$"):
        plan.layer(name)


def test_a_plan_without_layers_is_refused():
    with pytest.raises(PlanError, match="needs at least one layer"):
        Plan(layers={}, target="npu-qdq-int8")
