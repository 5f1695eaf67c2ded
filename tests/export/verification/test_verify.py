import dataclasses

import numpy as np
import onnx
import pytest
import torch

import qinvert
from qinvert import recall
from qinvert.errors import ExportError, InputError, VerificationError
from qinvert.plan.quantization import Quantization
from qinvert.stress import stress_matrices

METHODS = {
    "auto": lambda _: "auto",
    "packed": lambda chunk: qinvert.block_merge(chunk, base=4),
    "masked": lambda chunk: qinvert.block_merge(chunk, base=2, layout="masked"),
    "tiled": lambda chunk: qinvert.block_merge(chunk, base=1, tile=16),
    "corrected": lambda chunk: qinvert.block_merge(chunk, base=4, corrections=1),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("chunk", "count"), [(16, 352), (32, 88), (64, 22), (128, 6)])
@pytest.mark.parametrize(
    ("profile", "scales", "share"),
    [("int-ops", "float", 0.0), ("npu-qdq-int8", "pow2", 0.0), ("npu-qdq-int8", "float", 1e-4)],
)
def test_onnxruntime_equals_the_simulator(method, chunk, count, profile, scales, share, everything, agree):
    # More than 1e6 values per chunk size and profile, optimized and not.
    lower = everything(chunk, count)
    plan = qinvert.calibrate(lower[::16], method=METHODS[method](chunk), target=profile, scales=scales)
    agree(plan, lower, share, f"{profile} {scales} {method} C={chunk}")


@pytest.mark.parametrize("scales", ["float", "pow2"])
@pytest.mark.parametrize("profile", ["int-ops", "npu-qdq-int8"])
def test_captured_matrices_are_equal_in_onnxruntime(profile, scales, tmp_path):
    pytest.importorskip("transformers")
    model = recall.load_model()
    captured = {name: lower.flatten(0, -3) for name, lower in qinvert.capture(model, recall.sequences(8))}
    plan = qinvert.calibrate(captured, target=profile, scales=scales)
    for name, lower in captured.items():
        qinvert.export(plan, tmp_path / "t.onnx", layer=name, batch=32)
        for result in qinvert.verify(tmp_path / "t.onnx", plan, lower):
            assert result.mismatches <= (1e-4 * result.values if not result.exact else 0)


@pytest.fixture
def exported(tmp_path):
    lower = stress_matrices("correlated_keys", 10, 16)
    plan = qinvert.calibrate(lower, target="int-ops")
    qinvert.export(plan, tmp_path / "t.onnx", batch=4)
    return tmp_path / "t.onnx", plan, lower


def test_a_last_batch_is_filled_up(exported):
    path, plan, lower = exported
    # Every slot of every batch of 4 is compared.
    assert [r.values for r in qinvert.verify(path, plan, lower)] == [12 * 256] * 2
    assert [r.values for r in qinvert.verify(path, plan, lower[0])] == [4 * 256] * 2


def test_a_graph_from_minus_l_is_fed_minus_l(exported, tmp_path):
    _, plan, lower = exported
    qinvert.export(plan, tmp_path / "m.onnx", input="M")
    assert all(r.mismatches == 0 for r in qinvert.verify(tmp_path / "m.onnx", plan, lower))


def tampered(path):
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("factor/"):
            changed = onnx.numpy_helper.to_array(tensor) * np.float32(1.02)
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
            break
    onnx.save(model, path)


def test_a_wrong_constant_is_caught_with_the_first_element(exported):
    path, plan, lower = exported
    tampered(path)
    with pytest.raises(VerificationError, match=r"first at \[\d+, \d+, \d+\]: .* instead of"):
        qinvert.verify(path, plan, lower)


def test_another_plan_is_caught_and_said(exported):
    path, plan, lower = exported
    layer = plan.layer()
    coarser = {name: Quantization(format=q.format, scale=q.scale * 2) for name, q in layer.tensors.items()}
    other = qinvert.Plan(layers={"layer": dataclasses.replace(layer, tensors=coarser)}, target=plan.target)
    with pytest.raises(VerificationError, match="exported from another plan"):
        qinvert.verify(path, other, lower)


@pytest.mark.parametrize("content", [b"", b"\x08", b"not an onnx file" * 10, b"\xff" * 100])
def test_what_is_no_graph_is_an_export_error(exported, content):
    path, plan, lower = exported
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"not an ONNX model|no input L"):
        qinvert.verify(path, plan, lower)


def test_foreign_graphs_are_refused(exported, tmp_path):
    _, plan, lower = exported
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4, 16, 16])
    y = onnx.helper.make_tensor_value_info("T", onnx.TensorProto.FLOAT, [1, 4, 16, 16])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["T"])], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "f.onnx")
    with pytest.raises(ExportError, match="no input L or M"):
        qinvert.verify(tmp_path / "f.onnx", plan, lower, layer="layer")


def test_missing_files_and_unknown_runtimes_are_errors(exported, tmp_path):
    path, plan, lower = exported
    with pytest.raises(InputError, match="cannot read"):
        qinvert.verify(tmp_path / "missing.onnx", plan, lower)
    with pytest.raises(ExportError, match=r"unknown runtime 'abacus'; use one of .*onnxruntime"):
        qinvert.verify(path, plan, lower, runtimes=("abacus",))
    with pytest.raises(InputError, match="the plan is for 16 x 16"):
        qinvert.verify(path, plan, torch.zeros(2, 8, 8))


def dims(value, *sizes):
    del value.type.tensor_type.shape.dim[:]
    for size in sizes:
        dim = value.type.tensor_type.shape.dim.add()
        if isinstance(size, str):
            dim.dim_param = size
        else:
            dim.dim_value = size


def external(model):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="passwd")


def unknown_operator(model):
    model.graph.node[-1].domain = "nowhere"
    model.opset_import.add(domain="nowhere", version=1)


def loop(model):
    body = onnx.helper.make_graph([], "body", [], [])
    node = onnx.helper.make_node("Loop", ["", ""], ["unused"], name="forever", body=body)
    model.graph.node.insert(0, node)


def integer_output(model):
    model.graph.node[-1].output[0] = "real"
    model.graph.node.append(onnx.helper.make_node("Cast", ["real"], ["T"], to=onnx.TensorProto.INT32))
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT32


def sparse(model):
    tensor = onnx.SparseTensorProto(dims=[3])
    tensor.values.CopyFrom(onnx.numpy_helper.from_array(np.ones(1, np.float32), "sparse"))
    tensor.indices.CopyFrom(onnx.numpy_helper.from_array(np.zeros(1, np.int64), "indices"))
    model.graph.sparse_initializer.append(tensor)


DAMAGES = {
    "sparse constants": sparse,
    "batch 0": lambda m: dims(m.graph.input[0], 1, 0, 16, 16),
    "negative batch": lambda m: dims(m.graph.input[0], 1, -4, 16, 16),
    "huge batch": lambda m: dims(m.graph.input[0], 1, 2**40, 16, 16),
    "symbolic batch": lambda m: dims(m.graph.input[0], 1, "n", 16, 16),
    "three axes": lambda m: dims(m.graph.input[0], 4, 16, 16),
    "other batch than declared": lambda m: dims(m.graph.input[0], 1, 3, 16, 16),
    "two rows of matrices": lambda m: dims(m.graph.input[0], 2, 4, 16, 16),
    "other output": lambda m: dims(m.graph.output[0], 1, 4, 16, 8),
    "integer output": integer_output,
    "unknown operator": unknown_operator,
    "external data": external,
    "subgraph": loop,
    "wrong input type": lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 11),
    "no nodes": lambda m: m.graph.ClearField("node"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_graphs_that_only_look_like_ours_are_export_errors(exported, damage, capfd):
    path, plan, lower = exported
    model = onnx.load(path)
    DAMAGES[damage](model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError):
        qinvert.verify(path, plan, lower, layer="layer")


def test_random_damage_is_caught_or_harmless(exported):
    path, plan, lower = exported
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for position in generator.integers(len(content), size=3):
            damaged[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            qinvert.verify(path, plan, lower, layer="layer")
        except qinvert.QInvertError:
            refused += 1
    assert refused > 30


def test_the_result_says_how_good_the_runtime_is(exported):
    path, plan, lower = exported
    lower = lower[:8]
    report = qinvert.simulate(plan, lower).layers["layer"]
    for result in qinvert.verify(path, plan, lower):
        assert result.sqnr_db == pytest.approx(report.sqnr_db, abs=1e-9)
