from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import qinvert
from qinvert.cli.app import cli
from qinvert.errors import ExportError
from qinvert.export.encodings import STYLES, encodings, to_bytes
from qinvert.export.exporting import build, serialize
from qinvert.profiles import PROFILES
from qinvert.stress import stress_matrices

LOWER = stress_matrices("correlated_keys", 8, 16)
QDQ = [name for name, profile in PROFILES.items() if profile.quantized_everywhere]


def exported(profile, batch=8):
    method = qinvert.block_merge(16, base=4, corrections=1)
    bits = 16 if profile == "npu-qdq-int16" else "auto"
    plan = qinvert.calibrate(LOWER, method=method, bits=bits, target=profile, min_sqnr_db=0)
    return build(plan, batch=batch)


def constants(model):
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def quantized_tensors(model):
    """Return {float tensor: (scale, zero point)} from the nodes themselves."""
    values, written = constants(model), {name for node in model.graph.node for name in node.output}
    grids = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            grids[node.input[0]] = [values[name] for name in node.input[1:]]
        elif node.op_type == "DequantizeLinear" and node.input[0] not in written:
            grids[node.output[0]] = [values[name] for name in node.input[1:]]
    return grids


def read_back(model, style):
    """Return {name: (float32 scale, zero point, element)} from the written JSON."""
    document = json.loads(to_bytes(encodings(model, style)))
    if style == "aimet-2.0.0":
        entries = document["encodings"]
        return {e["name"]: (e["y_scale"], e.get("y_zero_point", 0), e["output_dtype"]) for e in entries}
    if style == "ort":
        return {name: (e["scale"], e["zero_point"], e.get("quant_type")) for name, (e,) in document.items()}
    entries = document["activation_encodings"] + document["param_encodings"]
    return {e["name"]: (*unsigned(e), f"{'' if e['is_sym'] else 'u'}int{e['bw']}") for e in entries}


def unsigned(entry):
    # x = (q_unsigned + offset) * scale, and a signed q is q_unsigned - 2**(bw - 1).
    (scale,), (offset,) = entry["scale"], entry["offset"]
    return scale, -offset - (2 ** (entry["bw"] - 1) if entry["is_sym"] else 0)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("profile", QDQ)
def test_every_quantized_tensor_has_an_entry_with_its_scale_bit_for_bit(profile, style):
    model = exported(profile)
    wanted, found = quantized_tensors(model), read_back(model, style)
    assert set(found) == set(wanted)
    assert len(found) > 30
    for name, (scale, zero) in wanted.items():
        read_scale, read_zero, kind = found[name]
        assert np.float32(read_scale).tobytes() == scale.tobytes()
        assert read_zero == int(zero)
        if style != "ort":
            assert kind == zero.dtype.name
        elif profile == "npu-qdq-int16":
            assert kind == f"QI{zero.dtype.name[1:]}"
        else:
            assert kind is None


@pytest.mark.parametrize("profile", [name for name in QDQ if name != "npu-qdq-int16"])
def test_every_name_is_a_float_tensor_that_remains_without_quantization(profile):
    model = exported(profile)
    stripped = without_quantization(model)
    remaining = {name for node in stripped.graph.node for name in (*node.input, *node.output)}
    named = set(read_back(model, "aimet-2.0.0"))
    assert named <= remaining
    # What has no entry is no quantized tensor: indices, bounds, and the two float ends.
    rest = {name for name in remaining - named if not name.startswith(("indices/", "clip/"))}
    unclipped = {n.input[0] for n in stripped.graph.node if n.op_type == "Clip"}
    assert rest - unclipped == {"L", "minus_one", "T", "identity"}


def without_quantization(model):
    """Return the float graph: what reads a DequantizeLinear reads what its QuantizeLinear read."""
    values, result, alias = constants(model), onnx.ModelProto(), {}
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.value_info[:]
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            alias[node.output[0]] = alias.get(node.input[0], node.input[0])
        elif node.op_type == "DequantizeLinear" and node.input[0] in alias:
            alias[node.output[0]] = alias[node.input[0]]
        elif node.op_type == "DequantizeLinear":
            q, scale, zero = (values[name] for name in node.input)
            real = (q.astype(np.float32) - zero.astype(np.float32)) * scale
            result.graph.initializer.append(numpy_helper.from_array(real, node.output[0]))
        else:
            kept = result.graph.node.add()
            kept.CopyFrom(node)
            kept.input[:] = [alias.get(name, name) for name in node.input]
    onnx.checker.check_model(result, full_check=True)
    return result


def with_quantization(stripped, grids):
    """Return the float graph with every named tensor quantized and dequantized after what writes it."""
    result = onnx.ModelProto()
    result.CopyFrom(stripped)
    del result.graph.node[:]
    renamed = {}

    def insert(name):
        scale, zero, element = grids[name]
        for suffix, value in (("s", np.float32(scale)), ("z", np.array(zero, dtype=element))):
            result.graph.initializer.append(numpy_helper.from_array(np.array(value), f"{name}/{suffix}"))
        grid = [f"{name}/s", f"{name}/z"]
        result.graph.node.append(onnx.helper.make_node("QuantizeLinear", [name, *grid], [f"{name}/q"]))
        result.graph.node.append(
            onnx.helper.make_node("DequantizeLinear", [f"{name}/q", *grid], [f"{name}/d"])
        )
        renamed[name] = f"{name}/d"

    for name in [*(v.name for v in stripped.graph.input), *(t.name for t in stripped.graph.initializer)]:
        if name in grids:
            insert(name)
    for node in stripped.graph.node:
        kept = result.graph.node.add()
        kept.CopyFrom(node)
        kept.input[:] = [renamed.get(name, name) for name in node.input]
        if node.output[0] in grids:
            insert(node.output[0])
    return result


@pytest.mark.parametrize("style", ["aimet-2.0.0", "aimet-1.0.0"])
@pytest.mark.parametrize("profile", ["npu-qdq-int8", "npu-qdq-uint8", "ryzen-xint8"])
def test_the_float_graph_and_its_encodings_are_the_exported_graph(profile, style):
    model = exported(profile)
    again = with_quantization(without_quantization(model), read_back(model, style))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    results = [
        onnxruntime.InferenceSession(serialize(m), options, providers=["CPUExecutionProvider"]).run(
            None, {"L": LOWER[None].numpy()}
        )[0]
        for m in (model, again)
    ]
    assert np.array_equal(*results)


def test_onnxruntime_quantizes_by_the_overrides(tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization")
    model = exported("npu-qdq-int8")
    onnx.save(without_quantization(model), tmp_path / "float.onnx")
    overrides = json.loads(to_bytes(encodings(model, "ort")))
    for (entry,) in overrides.values():
        # What onnxruntime.quantization.static_quantize_runner does with the file.
        entry["scale"] = np.array(entry["scale"], dtype=np.float32)
        entry["zero_point"] = np.array(entry["zero_point"])

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = [{"L": LOWER[None].numpy()}]

        def get_next(self):
            return self.batches.pop() if self.batches else None

    quantization.quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "quantized.onnx",
        Reader(),
        activation_type=quantization.QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Add", "Sub", "Mul", "Slice", "Concat"],
        extra_options={"TensorQuantOverrides": overrides, "ActivationSymmetric": True},
    )
    wanted = quantized_tensors(model)
    found = quantized_tensors(onnx.load(tmp_path / "quantized.onnx"))
    shared = set(wanted) & set(found)
    assert len(shared) > 30
    assert all(found[name][0] == wanted[name][0] for name in shared)


@pytest.mark.parametrize("profile", ["npu-qdq-int8", "npu-qdq-uint8", "npu-qdq-int16"])
def test_aimet_1_0_0_counts_from_the_unsigned_grid(profile):
    document = encodings(exported(profile), "aimet-1.0.0")
    assert document["version"] == "1.0.0"
    assert document["producer"] == {"package": "qinvert", "version": qinvert.__version__}
    for kind in ("activation_encodings", "param_encodings"):
        assert document[kind]
        for entry in document[kind]:
            assert entry["offset"] == [-(2 ** (entry["bw"] - 1))]
            assert (entry["dtype"], entry["enc_type"]) == ("INT", "PER_TENSOR")
            assert entry["is_sym"] == (profile != "npu-qdq-uint8")
    assert document["quantizer_args"]["activation_bitwidth"] == (16 if profile == "npu-qdq-int16" else 8)


def test_aimet_2_0_0_leaves_a_zero_point_of_0_out():
    int8, uint8 = (encodings(exported(p), "aimet-2.0.0") for p in ("npu-qdq-int8", "npu-qdq-uint8"))
    assert int8["version"] == "2.0.0"
    assert not any("y_zero_point" in entry for entry in int8["encodings"])
    assert {entry["y_zero_point"] for entry in uint8["encodings"]} == {128}


def test_equal_graphs_give_equal_bytes():
    for style in STYLES:
        first, second = (to_bytes(encodings(exported("npu-qdq-int8"), style)) for _ in range(2))
        assert first == second


@pytest.mark.parametrize("profile", ["int-ops", "int-ops-x86", "qlinear", "qlinear-uint8"])
def test_integer_graphs_have_no_encodings(profile):
    with pytest.raises(ExportError, match=r"multiplies integers.*export under a QDQ profile"):
        encodings(exported(profile), "aimet-2.0.0")


def test_unknown_styles_are_refused():
    with pytest.raises(ExportError, match=r"unknown encodings style 'yaml'; use one of aimet-2.0.0"):
        encodings(exported("npu-qdq-int8"), "yaml")


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture
def plan(tmp_path):
    plan = qinvert.calibrate({"a": LOWER, "b/c": LOWER / 2})
    plan.save(tmp_path / "plan.json")
    return plan


@pytest.mark.parametrize("style", STYLES)
def test_the_command_writes_them_beside_the_graphs(plan, style, tmp_path):
    result = run("export", tmp_path / "plan.json", "-o", tmp_path / "g", "--encodings", style, "--json")
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    for layer, file in written["encodings"].items():
        assert file == written["files"][layer].removesuffix(".onnx") + ".encodings.json"
        assert json.loads(Path(file).read_text()) == encodings(build(plan, layer=layer), style)
    assert sorted(path.name for path in (tmp_path / "g").iterdir()) == [
        "a.encodings.json",
        "a.onnx",
        "b_c.encodings.json",
        "b_c.onnx",
        "plan.json",
    ]
    assert run("verify", tmp_path / "g").exit_code == 0


def test_refused_encodings_leave_no_file(plan, tmp_path):
    arguments = ("export", tmp_path / "plan.json", "-o", tmp_path / "g", "--profile", "int-ops")
    result = run(*arguments, "--encodings", "ort")
    assert result.exit_code == 2
    assert "multiplies integers" in result.stderr
    assert not (tmp_path / "g").exists()
    assert run(*arguments).exit_code == 0


def test_verify_reports_what_breaks_a_rule(plan, tmp_path):
    run("export", tmp_path / "plan.json", "-o", tmp_path / "g", "--layer", "a")
    assert "rule" not in run("verify", tmp_path / "g").stdout
    model = onnx.load(tmp_path / "g" / "a.onnx")
    model.graph.node[1].ClearField("name")
    onnx.save(model, tmp_path / "g" / "a.onnx")
    result = run("verify", tmp_path / "g")
    assert result.exit_code == 0
    assert "has no node name" in result.stdout
    assert "(rule names)" in " ".join(result.stdout.split())
