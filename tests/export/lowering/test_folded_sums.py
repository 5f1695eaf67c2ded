"""Sums and elementwise products of grids that lie far apart: the form that no kernel folds."""

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch

import qinvert
from qinvert.export.runtimes.onnxruntime_cpu import session_options
from qinvert.formats import INT8
from qinvert.numerics.scales import float32
from qinvert.plan.far_sums import is_far
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import Meaning, Port
from qinvert.program.program import Program
from qinvert.program.steps import Add, Axis, Rescale, Scale, Shape
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
    model = qinvert.export(plan, tmp_path / "t.onnx", batch=4, chains=1)
    assert sum(node.op_type == "MatMul" for node in model.graph.node) == products
    names = {node.name for node in model.graph.node}
    assert (f"{total}/unfolded" in names) == (products == 2)
    (actual,) = onnx.reference.ReferenceEvaluator(model).run(None, {"L": LOWER[None].numpy()})
    assert np.array_equal(actual[0], plan.layer().inverse(LOWER).numpy())


def two_terms():
    """A program that adds its inputs, and nothing else."""
    ports = {name: Port(name=name, shape=Shape(1, 256, 256)) for name in ("a", "b", "y")}
    steps = (Add(output="y", left="a", right="b"),)
    return Program(name="sum", chunk=256, inputs=(ports["a"], ports["b"]), outputs=(ports["y"],), steps=steps)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("scales", [(3.0e4, FINE), (FINE, 3.0e4), (3.0e4, 3.0e4), (0.2, FINE)])
@pytest.mark.parametrize("allowed", ["0", "1"])
def test_onnxruntime_agrees_for_all_pairs_of_integers(profile, scales, allowed, tmp_path):
    a, b = map(float32, scales)
    grids = {name: Quantization(format=INT8, scale=s) for name, s in (("a", a), ("b", b), ("y", FINE))}
    layer = LayerPlan(program=two_terms(), tensors=grids, requantize=Requantize.DIVIDE)
    model = qinvert.export(
        qinvert.Plan(layers={"layer": layer}, target=profile), tmp_path / "t.onnx", batch=1
    )
    integers = torch.arange(-128.0, 128.0)
    given = {"a": (integers * a)[:, None].expand(256, 256), "b": (integers * b)[None].expand(256, 256)}
    options = session_options()
    # "0" is the default on x86: int8 becomes uint8 with zero points.
    options.add_session_config_entry("session.qdqisint8allowed", allowed)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    (actual,) = session.run(None, {name: x[None, None].contiguous().numpy() for name, x in given.items()})
    expected = layer.execute({name: x[None].contiguous() for name, x in given.items()})["y"].numpy()
    assert np.array_equal(actual[0], expected)


def test_the_planner_counts_the_products_that_far_sums_cost():
    lower = stress_matrices("repeated_keys", 4, 32)
    plans = {
        target: qinvert.calibrate(lower, method="neumann_doubling", target=target, min_sqnr_db=0).layer()
        for target in ("ryzen-xint8", "int-ops")
    }
    far = [s for s in plans["ryzen-xint8"].program.steps if is_far(s, plans["ryzen-xint8"].tensors)]
    assert far
    # Targets without a chip: there the cost is that of multiply-accumulates.
    costs = {target: plan.provenance["cost"] - plan.cost() for target, plan in plans.items()}
    assert costs == {"ryzen-xint8": len(far) * 32**3, "int-ops": 0}
    near = qinvert.calibrate(LOWER, method="neumann", target="ryzen-xint8", min_sqnr_db=0).layer()
    assert near.provenance["cost"] == near.cost()


def scaled():
    """A program that multiplies the rows of a by b, and nothing else."""
    a, y = (Port(name=name, shape=Shape(1, 256, 256)) for name in "ay")
    b = Port(name="b", shape=Shape(1, 256, 1), meaning=Meaning.BETA)
    steps = (Scale(output="y", source="a", vector="b", axis=Axis.ROWS),)
    return Program(name="scale", chunk=256, inputs=(a, b), outputs=(y,), steps=steps)


def rescaled(factor):
    a, y = (Port(name=name, shape=Shape(1, 256, 256)) for name in "ay")
    return Program(
        name="rescale",
        chunk=256,
        inputs=(a,),
        outputs=(y,),
        steps=(Rescale(output="y", source="a", factor=factor),),
    )


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", ["scale", "rescale", "negative rescale"])
@pytest.mark.parametrize(("ratio", "products"), [(6.0e4, 0), (7.0e4, 1), (1.0e8, 1), (1.0e20, 1)])
def test_products_far_beyond_the_grid_saturate_in_onnxruntime(profile, kind, ratio, products, tmp_path):
    one = float32(2 / 127)
    program = scaled() if kind == "scale" else rescaled(-1.5 if "negative" in kind else 1.5)
    scales = {"a": float32(1e-3 * ratio**0.5), "b": one}
    scales["y"] = float32(scales["a"] * (one if kind == "scale" else 1.5) / ratio)
    grids = {name: Quantization(format=INT8, scale=scales[name]) for name in program.tensors}
    layer = LayerPlan(program=program, tensors=grids, requantize=Requantize.DIVIDE)
    model = qinvert.export(
        qinvert.Plan(layers={"layer": layer}, target=profile), tmp_path / "t.onnx", batch=1
    )
    assert sum(node.op_type == "MatMul" for node in model.graph.node) == products
    assert qinvert.export.lint(model) == []
    integers = torch.arange(-128.0, 128.0)
    given = {"a": (integers * scales["a"]).expand(256, 256).contiguous()}
    if kind == "scale":
        given["b"] = (integers.abs() * one).clamp(2.0**-14)[:, None].contiguous()
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options())
    (actual,) = session.run(None, {name: x[None, None].numpy() for name, x in given.items()})
    expected = layer.execute({name: x[None] for name, x in given.items()})["y"].numpy()
    steps = np.abs(actual[0] - expected) / scales["y"]
    # Exact ties may go either way, because the kernel multiplies in another order.
    assert steps.max() <= 1.01
    assert (steps > 0.5).mean() < 1e-2
