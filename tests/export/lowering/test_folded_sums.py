"""Sums of grids that lie far apart: the form that no kernel folds into a float32 offset."""

import numpy as np
import onnx
import onnx.reference
import pytest
import torch

import qinvert
from qinvert.formats import INT8
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.stress import stress_matrices

PROFILES = ("npu-qdq-int8", "npu-qdq-uint8")
FINE = float32(6.9e-3)
LOWER = stress_matrices("small_random", 4, 16)


def planned(scale, target):
    """A sum of a coarse power and a fine matrix; everything else is on the fine grid."""
    program = qinvert.neumann(16, 2)
    (total,) = [step.output for step in program.steps if type(step).__name__ == "Add"]
    (power,) = [step.output for step in program.steps if type(step).__name__ == "MatMul"]
    grids = dict.fromkeys(program.tensors, Quantization(format=INT8, scale=FINE))
    grids[power] = Quantization(format=INT8, scale=scale)
    layer = LayerPlan(program=program, tensors=grids, requantize=Requantize.DIVIDE)
    return qinvert.Plan(layers={"layer": layer}, target=target), total


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("ratio", "products"), [(29.9, 1), (30.1, 2), (4.35e6, 2)])
def test_a_sum_beyond_the_bound_begins_with_a_product(profile, ratio, products, tmp_path):
    plan, total = planned(float32(ratio * FINE), profile)
    model = qinvert.export(plan, tmp_path / "t.onnx", batch=4)
    assert sum(node.op_type == "MatMul" for node in model.graph.node) == products
    names = {node.name for node in model.graph.node}
    assert (f"{total}/unfolded" in names) == (products == 2)
    (actual,) = onnx.reference.ReferenceEvaluator(model).run(None, {"L": LOWER[None].numpy()})
    assert np.array_equal(actual[0], plan.layer().inverse(LOWER).numpy())


@pytest.mark.parametrize("profile", PROFILES)
def test_onnxruntime_agrees_where_scales_are_4e6_apart(profile, tmp_path):
    plan, _ = planned(float32(3.0e4), profile)
    qinvert.export(plan, tmp_path / "t.onnx", batch=4)
    for result in qinvert.verify(tmp_path / "t.onnx", plan, torch.cat([LOWER, 0 * LOWER])):
        assert result.mismatches == 0
