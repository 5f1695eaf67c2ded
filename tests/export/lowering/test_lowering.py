from __future__ import annotations

import numpy as np
import onnx.reference
import pytest
import torch
from inverse_programs import inverse_program

import qinvert
from qinvert.export.exporting import build
from qinvert.formats import INT4, INT8
from qinvert.numerics.scales import float32, is_power_of_two
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.profiles import PROFILES
from qinvert.program.ports import MATRIX
from qinvert.program.steps import MatMul, Rescale
from qinvert.stress import STRESS, stress_matrices

FACTORS = [-1.0, 0.5, 1 / 3, -2.7, 2.0**-7, 1.0000001]
LOWER = torch.cat([stress_matrices(n, 60, 16) for n in ("half_random", "negative_eigenvalues", "wide_gates")])


def planned(steps, scales: dict[str, float], target: str, fmt=INT8) -> qinvert.Plan:
    program = inverse_program(*steps, name="rescaling", chunk=16)
    tensors = {
        name: Quantization(format=fmt, scale=float32(scales.get(name, 1 / 63))) for name in program.tensors
    }
    layer = LayerPlan(program=program, tensors=tensors, requantize=Requantize.DIVIDE)
    return qinvert.Plan(layers={"layer": layer}, target=target)


def rescaling(factor: float, scales: dict[str, float], target: str, fmt=None) -> qinvert.Plan:
    # A factor before a product and one at the end.
    steps = (
        Rescale(output="scaled", source=MATRIX, factor=float32(factor)),
        MatMul(output="square", left="scaled", right="scaled", add=("scaled",)),
        Rescale(output="negated", source="square", factor=-1.0),
        Rescale(output="result", source="negated", factor=float32(factor)),
    )
    return planned(steps, scales, target, fmt or PROFILES[target].formats[0])


FLOAT_SCALES = {"scaled": 1 / 45, "negated": 0.0123, "result": 0.0171}
POW2_SCALES = {"M": 2.0**-6, "scaled": 2.0**-7, "square": 2.0**-5, "negated": 2.0**-6, "result": 2.0**-8}


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(
    ("profile", "scales"),
    [("int-ops", FLOAT_SCALES), ("int-ops", POW2_SCALES), ("npu-qdq-int8", POW2_SCALES)],
)
def test_factors_are_bit_exact_in_onnxruntime(factor, profile, scales, tmp_path):
    plan = rescaling(factor, scales, profile)
    qinvert.export(plan, tmp_path / "t.onnx", batch=20)
    for result in qinvert.verify(tmp_path / "t.onnx", plan, LOWER):
        assert result.exact
        assert result.mismatches == 0


@pytest.mark.parametrize("factor", FACTORS)
def test_a_factor_in_qdq_under_float_scales_differs_by_ties_only(factor, tmp_path):
    step = Rescale(output="scaled", source=MATRIX, factor=float32(factor))
    plan = planned((step,), {"scaled": 0.0123}, "npu-qdq-int8")
    qinvert.export(plan, tmp_path / "t.onnx", batch=20)
    for result in qinvert.verify(tmp_path / "t.onnx", plan, LOWER):
        assert result.mismatches <= 1e-4 * result.values
        assert result.max_steps < 1.5


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("profile", PROFILES)
def test_the_reference_evaluator_knows_factors_too(factor, profile):
    if PROFILES[profile].power_of_two_scales and not is_power_of_two(float32(factor)):
        pytest.skip("the profile takes powers of two only")
    plan = rescaling(factor, POW2_SCALES, profile)
    model = build(plan, batch=len(LOWER))
    # onnx's evaluator lacks DequantizeLinear before opset 19.
    model.opset_import[0].version = max(19, model.opset_import[0].version)
    (actual,) = onnx.reference.ReferenceEvaluator(model).run(None, {"L": LOWER[None].numpy()})
    assert np.array_equal(actual[0], plan.layer().inverse(LOWER).numpy())


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("method", ["newton_schulz", "banded_residual"])
def test_programs_with_factors_and_masks_are_bit_exact_under_powers_of_two(method, profile, tmp_path):
    if method == "newton_schulz" and PROFILES[profile].power_of_two_scales:
        pytest.skip("its factors are no powers of two")
    lower = torch.cat([stress_matrices(name, 40, 16, seed=3) for name in STRESS])
    plan = qinvert.calibrate(lower[::5], method=method, target=profile, scales="pow2")
    qinvert.export(plan, tmp_path / "t.onnx", batch=40)
    for result in qinvert.verify(tmp_path / "t.onnx", plan, lower):
        # Sums of int16 products are wider than float32, in which onnxruntime computes them.
        assert result.exact == ("int16" not in plan.layer().formats)
        assert result.mismatches == 0


def test_factors_of_int4_clip_to_its_grid(tmp_path):
    plan = rescaling(-2.7, {}, "int-ops", INT4)
    qinvert.export(plan, tmp_path / "t.onnx", batch=20)
    assert all(r.mismatches == 0 for r in qinvert.verify(tmp_path / "t.onnx", plan, LOWER))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_factor_of_one_is_no_product(profile):
    plan = rescaling(1.0, POW2_SCALES, profile)
    nodes = build(plan, batch=2, chains=1).graph.node
    products = {node.output[0] for node in nodes if node.op_type == "Mul"}
    assert not products & {"scaled/float", "scaled/product", "result/float", "result/product"}
    assert len(products & {"negated/float", "negated/product"}) == 1
