"""Exported graphs inside hosts: merged by onnx.compose, and run in onnxruntime."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, compose, helper, numpy_helper

import qinvert
from qinvert.cli.app import cli
from qinvert.errors import ExportError
from qinvert.stress import stress_matrices

CHUNK, BATCH = 16, 4
LOWER = stress_matrices("independent_keys", BATCH, CHUNK)


@pytest.fixture(scope="module")
def plan():
    return qinvert.calibrate({"layers.0": LOWER, "layers.1": LOWER * 0.5}, bits=8)


def run(model, feeds):
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {name: value.astype(np.float32) for name, value in feeds.items()})


def given(name):
    return LOWER.numpy()[None] * (1.0 if name == "layers.0" else 0.5)


def test_two_layers_merge_after_a_prefix(plan, tmp_path):
    parts = [
        compose.add_prefix(qinvert.export(plan, tmp_path / "t.onnx", layer=name, batch=BATCH), f"{i}/")
        for i, name in enumerate(plan.layers)
    ]
    # T of the first layer, whose diagonal is 1, is no input of the second: both run side by side.
    merged = compose.merge_models(*parts, io_map=[])
    onnx.checker.check_model(merged, full_check=True)
    for i, (name, found) in enumerate(
        zip(plan.layers, run(merged, {f"{i}/L": given(n) for i, n in enumerate(plan.layers)}), strict=True)
    ):
        expected = plan.layers[name].inverse(torch.from_numpy(given(name)))
        assert np.array_equal(found, expected.numpy()), i
    keys = {entry.key for entry in merged.metadata_props}
    assert {"qinvert.layer/layers.0", "qinvert.layer/layers.1"} <= keys


def host(opset, ir):
    """``L = tril(x x^T, -1) / 16`` before the inverse."""
    mask = numpy_helper.from_array(np.tril(np.ones((CHUNK, CHUNK), np.float32) / 16, -1), "mask")
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["x", "turned"], ["products"]),
        helper.make_node("Mul", ["products", "mask"], ["lower"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, BATCH, CHUNK, width))
        for name, width in (("x", 8), ("lower", CHUNK))
    ]
    graph = helper.make_graph(nodes, "host", ends[:1], ends[1:], [mask])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


@pytest.mark.parametrize(("opset", "ir"), [(17, 8), (21, 10), (23, 11)])
def test_the_inverse_goes_into_a_host_of_its_versions(plan, tmp_path, opset, ir):
    inverse = qinvert.export(
        plan, tmp_path / "t.onnx", layer="layers.0", batch=BATCH, opset=opset, ir_version=ir
    )
    assert (inverse.opset_import[0].version, inverse.ir_version) == (opset, ir)
    outer = host(opset, ir)
    merged = compose.merge_models(outer, compose.add_prefix(inverse, "inverse/"), [("lower", "inverse/L")])
    x = np.random.default_rng(0).uniform(-1, 1, (1, BATCH, CHUNK, 8)).astype(np.float32)
    lower = torch.from_numpy(run(outer, {"x": x})[0])
    (found,) = run(merged, {"x": x})
    assert np.array_equal(found, plan.layers["layers.0"].inverse(lower).numpy())


def test_another_version_does_not_merge(plan, tmp_path):
    inverse = qinvert.export(plan, tmp_path / "t.onnx", layer="layers.0", batch=BATCH, ir_version=8)
    with pytest.raises(ValueError, match="IR version"):
        compose.merge_models(host(17, 10), compose.add_prefix(inverse, "i/"), [("lower", "i/L")])


def test_the_layer_of_a_file_is_known_and_of_a_merged_one_asked_for(plan, tmp_path):
    qinvert.export(plan, tmp_path / "t.onnx", layer="layers.1", batch=BATCH)
    assert qinvert.verify(tmp_path / "t.onnx", plan, LOWER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 12}, "opset"),
        ({"opset": 99}, "opset"),
        ({"ir_version": 3}, "ir_version"),
        ({"ir_version": 99}, "ir_version"),
        ({"opset": 19, "profile": "npu-qdq-int16"}, "opset"),
    ],
)
def test_versions_that_cannot_be_are_refused(plan, tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        qinvert.export(plan, tmp_path / "t.onnx", layer="layers.0", **options)
    assert not (tmp_path / "t.onnx").exists()


def test_all_layers_inline(plan, tmp_path):
    plain = qinvert.export_layers(plan, tmp_path / "t.onnx", batch=BATCH, inline=True, ir_version=8)
    assert (len(plain.functions), plain.ir_version) == (0, 8)
    assert [entry.domain for entry in plain.opset_import] == [""]
    called = qinvert.export_layers(plan, tmp_path / "f.onnx", batch=BATCH)
    feeds = {f"{name}/L": given(name) for name in plan.layers}
    for found, wanted in zip(run(plain, feeds), run(called, feeds), strict=True):
        assert np.array_equal(found, wanted)
    with pytest.raises(ExportError, match="inline=True"):
        qinvert.export_layers(plan, tmp_path / "f.onnx", ir_version=8)


def test_the_command_has_the_same_options(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    base = ["export", str(tmp_path / "plan.json"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, [*base, "--one-file", "--inline", "--opset", "17", "--ir-version", "8"])
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "out").glob("*.onnx")
    written = onnx.load(file)
    assert (len(written.functions), written.ir_version, written.opset_import[0].version) == (0, 8, 17)
    refused = CliRunner().invoke(cli, [*base, "--inline"])
    assert refused.exit_code == 2
    assert "--one-file" in refused.stderr


def test_inlined_layers_are_not_verified_and_never_passed_over(plan, tmp_path):
    """Also beside graphs of single layers, which are: the file would look as if it had been verified."""
    plan.save(tmp_path / "plan.json")
    base = ["export", str(tmp_path / "plan.json"), "-o", str(tmp_path / "out")]
    for options in (["--one-file", "--inline"], []):
        assert CliRunner().invoke(cli, [*base, *options]).exit_code == 0
        refused = CliRunner().invoke(cli, ["verify", str(tmp_path / "out")])
        assert refused.exit_code == 2
        (line,) = refused.stderr.splitlines()
        assert "all_layers.onnx has plain nodes" in line
        assert "without --inline" in line
    with pytest.raises(ExportError, match="inline=True"):
        qinvert.verify(tmp_path / "out" / "all_layers.onnx", plan, given("layers.0"), layer="layers.0")
    assert CliRunner().invoke(cli, [*base, "--one-file"]).exit_code == 0
    assert CliRunner().invoke(cli, ["verify", str(tmp_path / "out")]).exit_code == 0
