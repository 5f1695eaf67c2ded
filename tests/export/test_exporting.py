import dataclasses
import os
import subprocess
import sys
from functools import cache

import numpy as np
import onnx
import onnx.reference
import pytest
import torch

import qinvert
from qinvert.errors import ExportError, PlanError
from qinvert.methods import METHODS
from qinvert.plan.quantization import Quantization
from qinvert.profiles import PROFILES
from qinvert.stress import stress_matrices

LOWER = stress_matrices("correlated_keys", 8, 16)


@cache
def planned(profile):
    method = qinvert.block_merge(16, base=4, corrections=1)
    return qinvert.calibrate(LOWER, method=method, target=profile, min_sqnr_db=0)


@pytest.fixture(scope="module")
def plan():
    return planned("npu-qdq-int8")


def reference(model):
    # onnx's evaluator lacks DequantizeLinear before opset 19; the operators here mean the same.
    newer = onnx.ModelProto()
    newer.CopyFrom(model)
    newer.opset_import[0].version = max(19, model.opset_import[0].version)
    return onnx.reference.ReferenceEvaluator(newer)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("source", ["L", "M"])
def test_the_reference_evaluator_agrees_with_the_simulator(profile, source, tmp_path):
    plan = planned(profile)
    model = qinvert.export(plan, tmp_path / "t.onnx", profile=profile, batch=8, input=source)
    feed = {source: (LOWER if source == "L" else -LOWER)[None].numpy()}
    (actual,) = reference(model).run(None, feed)
    expected = plan.layer().inverse(LOWER).numpy()
    steps = np.abs(actual[0] - expected) / plan.layer().output.scale
    # A float MatMul in another summation order may round one tie the other way.
    assert steps.max() < 1.5
    assert np.count_nonzero(steps) <= (0 if PROFILES[profile].exact else 2)


@pytest.mark.parametrize("profile", PROFILES)
def test_graphs_are_static_4_d_and_keep_to_their_operators(profile, tmp_path):
    plan = planned(profile)
    model = qinvert.export(plan, tmp_path / "t.onnx", profile=profile, batch=3, chains=1)
    assert model.opset_import[0].version == PROFILES[profile].opset
    assert {node.op_type for node in model.graph.node} <= PROFILES[profile].operators
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    for value in values:
        sizes = [d.dim_value for d in value.type.tensor_type.shape.dim]
        assert len(sizes) == 4
        assert sizes[0] == 1
        assert all(size > 0 for size in sizes)
        assert sizes[1] % 3 == 0
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 16, 16]
    assert [v.name for v in model.graph.output] == ["T"]


def test_every_qdq_product_and_sum_sits_between_dequantize_and_quantize(plan, tmp_path):
    model = qinvert.export(plan, tmp_path / "t.onnx", profile="npu-qdq-int8")
    writer = {output: node for node in model.graph.node for output in node.output}
    readers = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    initializers = {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Add", "Concat", "Slice") and node.output[0] != "T":
            tensors = [n for n in node.input if n not in initializers]
            assert all(writer[name].op_type == "DequantizeLinear" for name in tensors), node.name
            assert readers[node.output[0]] == ["QuantizeLinear"], node.name


def test_concats_join_rows_before_columns_on_one_scale(plan, tmp_path):
    model = qinvert.export(plan, tmp_path / "t.onnx", profile="npu-qdq-int8")
    writer = {output: node for node in model.graph.node for output in node.output}
    columns = [n for n in model.graph.node if n.op_type == "Concat" and n.attribute[0].i == 3]
    assert columns
    for node in model.graph.node:
        if node.op_type == "Concat":
            scales = {writer[name].input[1] for name in node.input}
            assert len(scales) == 1, node.name


def test_names_read_in_netron(plan, tmp_path):
    model = qinvert.export(plan, tmp_path / "t.onnx", chains=1)
    names = {node.name for node in model.graph.node}
    assert {"M/int8", "merge_16/Y", "merge_16/S21", "correction_1/R", "T"} <= names
    assert len(names) == len(model.graph.node)
    metadata = {p.key: p.value for p in model.metadata_props}
    assert metadata["qinvert.profile"] == "npu-qdq-int8"
    assert "qinvert.layer/layer" in metadata
    assert len(metadata["qinvert.plan_sha256"]) == 64


@pytest.mark.parametrize("profile", PROFILES)
def test_equal_arguments_give_equal_bytes(profile, tmp_path):
    plan = planned(profile)
    for name in ("a.onnx", "b.onnx"):
        qinvert.export(plan, tmp_path / name, profile=profile)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


DIGESTS = """
import hashlib, qinvert
from qinvert.export.exporting import build, serialize
from qinvert.profiles import PROFILES
from qinvert.stress import stress_matrices
lower = stress_matrices("correlated_keys", 8, 16)
for profile in PROFILES:
    plan = qinvert.calibrate(lower, method="block_merge", target=profile, min_sqnr_db=0)
    print(profile, hashlib.sha256(serialize(build(plan, profile=profile))).hexdigest())
"""


def test_another_process_with_another_hash_seed_exports_the_same_bytes():
    outputs = {
        subprocess.run(
            [sys.executable, "-c", DIGESTS],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    (output,) = outputs
    assert len(set(output.split())) == 2 * len(PROFILES)


def test_int4_values_stay_on_their_grid_in_an_int8_container(tmp_path):
    plan = qinvert.calibrate(LOWER, bits=4, target="int-ops")
    model = qinvert.export(plan, tmp_path / "t.onnx")
    assert any(node.op_type == "Clip" for node in model.graph.node)
    beyond = 3 * LOWER
    (actual,) = onnx.reference.ReferenceEvaluator(model).run(None, {"L": beyond[None].numpy()})
    assert np.array_equal(actual[0], plan.layer().inverse(beyond).numpy())
    strict = np.tril(actual[0], -1) / plan.layer().output.scale
    assert np.abs(strict).max() <= 7.001


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_method_exports_under_every_profile(method, profile, tmp_path):
    lower = stress_matrices("repeated_keys", 4, 32)
    plan = qinvert.calibrate(lower, method=method, target=profile)
    if method == "newton_schulz" and PROFILES[profile].power_of_two_scales:
        with pytest.raises(ExportError, match="factor"):
            qinvert.export(plan, tmp_path / "t.onnx", batch=2)
        return
    qinvert.export(plan, tmp_path / "t.onnx", batch=2)
    results = qinvert.verify(tmp_path / "t.onnx", plan, lower)
    assert [r.runtime for r in results] == ["onnxruntime (unoptimized)", "onnxruntime (optimized)"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"profile": "toaster"}, ExportError, "npu-qdq-int8"),
        ({"layer": "nope"}, PlanError, "unknown layer 'nope'; the plan has layer"),
        ({"batch": 0}, ExportError, "batch 0"),
        ({"batch": True}, ExportError, "batch True"),
        ({"input": "K"}, ExportError, "input 'K'"),
    ],
)
def test_illegal_arguments_are_refused_and_leave_no_file(plan, arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        qinvert.export(plan, tmp_path / "t.onnx", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_lacks_the_format_refuses_the_plan(tmp_path):
    plan = qinvert.calibrate(LOWER, bits=4, target="int-ops")
    with pytest.raises(ExportError, match="takes int8; tensor 'M' is int4"):
        qinvert.export(plan, tmp_path / "t.onnx", profile="npu-qdq-int8")


def test_an_unwritable_place_is_an_error(plan, tmp_path):
    with pytest.raises(ValueError, match="cannot write"):
        qinvert.export(plan, tmp_path / "missing" / "t.onnx")


def test_the_package_is_also_the_verb():
    assert callable(qinvert.export)
    assert qinvert.export.__name__ == "qinvert.export"
    assert torch.is_tensor(LOWER)


def test_one_must_not_take_endless_identity_blocks(tmp_path):
    lower = stress_matrices("half_random", 4, 16)
    plan = qinvert.calibrate(lower, method=qinvert.block_merge(16, base=2))
    layer = plan.layer()
    fine = {
        n: Quantization(format=q.format, scale=float(np.float32(1 / 8129))) for n, q in layer.tensors.items()
    }
    hostile = qinvert.Plan(layers={"layer": dataclasses.replace(layer, tensors=fine)}, target=plan.target)
    with pytest.raises(ExportError, match="identity blocks"):
        qinvert.export(hostile, tmp_path / "t.onnx")
    assert list(tmp_path.iterdir()) == []
