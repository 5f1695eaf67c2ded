from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnx.reference
import pytest
import torch

import qinvert
from qinvert.errors import ExportError, InputError, VerificationError
from qinvert.methods import block_merge
from qinvert.profiles import PROFILES
from qinvert.program.steps import MIN_BETA
from qinvert.stress import from_keys, unit_keys


def keyed(count, chunk, seed=0, top=1.0):
    """With rows whose beta is 0, or next to it."""
    generator = torch.Generator().manual_seed(seed)
    keys = unit_keys(count, chunk, 0.5, generator)
    beta = top * torch.rand(count, chunk, generator=generator)
    beta[0], beta[1, chunk // 2 :], beta[2, 5], beta[3, 6] = 0, 0, 1e-7, MIN_BETA / 2
    return from_keys(keys, beta, -0.01 * torch.rand(count, chunk, generator=generator)), beta


@cache
def planned(profile, scales="float", corrections=0, chunk=16, **options):
    method = block_merge(chunk, factored=True, corrections=corrections)
    data = keyed(64, chunk, top=options.pop("top", 1.0))
    options = {"target": profile, "scales": scales, "min_sqnr_db": 0.0, **options}
    return qinvert.calibrate(data, method=method, **options)


@pytest.mark.parametrize(
    ("profile", "scales", "exact"),
    [
        ("int-ops", "float", True),
        ("int-ops", "pow2", True),
        ("npu-qdq-int8", "pow2", True),
        ("npu-qdq-int8", "float", False),
    ],
)
@pytest.mark.parametrize(("corrections", "top"), [(0, 1.0), (0, 2.0), (1, 1.0)])
def test_a_million_values_are_equal_in_onnxruntime(
    profile, scales, exact, corrections, top, tmp_path, capsys
):
    plan = planned(profile, scales, corrections, 64, bits=8, top=top)
    lower, beta = keyed(256, 64, seed=1, top=top)
    qinvert.export(plan, tmp_path / "t.onnx", batch=16)
    for result in qinvert.verify(tmp_path / "t.onnx", plan, lower, beta=beta):
        assert result.values == 2**20
        assert result.exact == exact
        assert result.mismatches <= (0 if exact else 1e-4 * result.values)
        assert result.max_steps < 1.5
        if result.mismatches:
            with capsys.disabled():
                print(f"\n{profile} {scales}: {result}")


@pytest.mark.parametrize(("profile", "bits"), [("int-ops", "8x2"), ("int-ops", 4), ("npu-qdq-int4", 4)])
@pytest.mark.parametrize("corrections", [0, 1])
def test_other_formats_are_equal_too(profile, bits, corrections, tmp_path):
    plan = planned(profile, "pow2", corrections, 32, bits=bits)
    lower, beta = keyed(40, 32, seed=1)
    qinvert.export(plan, tmp_path / "t.onnx")
    assert all(r.mismatches == 0 for r in qinvert.verify(tmp_path / "t.onnx", plan, lower, beta=beta))


@pytest.mark.parametrize("scales", ["float", "pow2"])
@pytest.mark.parametrize("corrections", [0, 1])
def test_16_bits_multiply_a_vector_as_a_whole(scales, corrections, tmp_path):
    plan = planned("npu-qdq-int16", scales, corrections, 32, bits=16)
    lower, beta = keyed(40, 32, seed=1)
    qinvert.export(plan, tmp_path / "t.onnx")
    for result in qinvert.verify(tmp_path / "t.onnx", plan, lower, beta=beta):
        # Two planes of beta, rounded apart, would differ in one value of 15.
        assert result.mismatches <= (0 if scales == "pow2" else 0.01 * result.values)


def test_a_multiplier_plan_runs_as_integers_too(tmp_path):
    plan, (lower, beta) = planned("npu-qdq-int8"), keyed(16, 16, seed=1)
    assert plan.layer().requantize == "multiplier"
    qinvert.export(plan, tmp_path / "t.onnx", profile="int-ops", input="M")
    for result in qinvert.verify(tmp_path / "t.onnx", plan, lower, beta=beta):
        assert (result.mismatches, result.exact) == (0, True)


@pytest.mark.parametrize("profile", ["int-ops", "npu-qdq-int8"])
@pytest.mark.parametrize("source", ["L", "M"])
def test_the_reference_evaluator_agrees_with_the_simulator(profile, source, tmp_path):
    plan, (lower, beta) = planned(profile), keyed(8, 16, seed=1)
    model = qinvert.export(plan, tmp_path / "t.onnx", input=source)
    feed = {source: (lower if source == "L" else -lower)[None].numpy(), "beta": beta[None, ..., None].numpy()}
    (actual,) = onnx.reference.ReferenceEvaluator(model).run(None, feed)
    differ = actual[0] != plan.layer().inverse(lower, beta).numpy()
    # A float MatMul in another summation order may round one tie the other way.
    assert differ.sum() <= (0 if profile == "int-ops" else 2)


@pytest.mark.parametrize("profile", PROFILES)
def test_graphs_take_beta_as_a_column_and_keep_to_their_operators(profile, tmp_path):
    plan = planned(profile, "pow2")
    model = qinvert.export(plan, tmp_path / "t.onnx", batch=3)
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.input, *model.graph.output, *model.graph.value_info)
    }
    assert [v.name for v in model.graph.input] == ["L", "beta"]
    assert shapes["L"] == shapes["T"] == shapes["K"] == [1, 3, 16, 16]
    assert shapes["beta"] == [1, 3, 16, 1]
    assert shapes["beta/transposed"] == [1, 3, 1, 16]
    assert {node.op_type for node in model.graph.node} <= PROFILES[profile].operators
    assert all(len(shape) == 4 and all(size > 0 for size in shape) for shape in shapes.values())


def test_only_the_ends_of_a_qdq_graph_are_float(tmp_path):
    model = qinvert.export(planned("npu-qdq-int8"), tmp_path / "t.onnx")
    writer = {output: node for node in model.graph.node for output in node.output}
    readers = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    initializers = {t.name for t in model.graph.initializer}
    ends = {"M/negated", "beta/floored", "K", "beta/transposed", "T/strictly_lower", "T"}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Add", "Mul") and node.name not in ends:
            tensors = [name for name in node.input if name not in initializers]
            assert {writer[name].op_type for name in tensors} == {"DequantizeLinear"}, node.name
            assert [reader.op_type for reader in readers[node.output[0]]] == ["QuantizeLinear"], node.name
    assert [reader.name for reader in readers["K"]] == ["M/int8"]
    assert sorted(reader.name for reader in readers["beta/floored"]) == [
        "K", "T/strictly_lower", "beta/rows", "beta/transposed",
    ]  # fmt: skip


def test_plain_graphs_have_no_trace_of_beta(tmp_path):
    lower, beta = keyed(8, 16)
    model = qinvert.export(qinvert.calibrate((lower, beta)), tmp_path / "t.onnx")
    assert [v.name for v in model.graph.input] == ["L"]
    assert not {"Div", "Max", "Transpose"} & {node.op_type for node in model.graph.node}


def test_a_chunk_of_two_has_no_scales_and_exports_all_the_same(tmp_path):
    lower = torch.tensor([[[0.0, 0.0], [0.5, 0.0]], [[0.0, 0.0], [-0.1, 0.0]]])
    beta = torch.tensor([[0.3, 0.6], [0.2, 0.1]])
    plan = qinvert.calibrate((lower, beta), factored=True)
    qinvert.export(plan, tmp_path / "t.onnx", batch=2)
    for result in qinvert.verify(tmp_path / "t.onnx", plan, lower, beta=beta):
        assert result.mismatches == 0
        assert result.sqnr_db > 40


@pytest.fixture
def exported(tmp_path):
    plan = planned("int-ops")
    qinvert.export(plan, tmp_path / "t.onnx", batch=4)
    return tmp_path / "t.onnx", plan, *keyed(10, 16, seed=1)


def test_verify_wants_a_legal_beta(exported):
    path, plan, lower, beta = exported
    for wrong, words in ((None, "beta, which is missing"), (beta[:4], "beta has shape"), (-beta, "not in")):
        with pytest.raises(InputError, match=words):
            qinvert.verify(path, plan, lower, beta=wrong)


def test_leading_axes_and_a_last_batch_are_filled_up(exported):
    path, plan, lower, beta = exported
    nested = qinvert.verify(path, plan, lower.reshape(2, 5, 16, 16), beta=beta.reshape(2, 5, 16))
    assert [(r.values, r.mismatches) for r in nested] == [(12 * 256, 0)] * 2


@pytest.mark.parametrize("name", ["smallest_beta", "factor", "identity"])
def test_a_wrong_constant_is_caught(exported, name):
    path, plan, lower, beta = exported
    model = onnx.load(path)
    (tensor, *_) = [t for t in model.graph.initializer if t.name.startswith(name)]
    changed = onnx.numpy_helper.to_array(tensor) * np.float32(1.02 if name != "smallest_beta" else 4000)
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed.astype(np.float32), tensor.name))
    onnx.save(model, path)
    with pytest.raises(VerificationError, match="first at"):
        qinvert.verify(path, plan, lower, beta=beta)


def without_beta(model):
    del model.graph.input[1]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 4, 16, 1), np.float32), "beta"))


def beta_as_row(model):
    dims = model.graph.input[1].type.tensor_type.shape.dim
    dims[2].dim_value, dims[3].dim_value = 1, 16


def renamed(model):
    model.graph.input[1].name = "gamma"
    for node in model.graph.node:
        node.input[:] = ["gamma" if name == "beta" else name for name in node.input]


def third(model):
    model.graph.input.append(onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1]))


@pytest.mark.parametrize("damage", [without_beta, beta_as_row, renamed, third])
def test_graphs_that_only_look_like_ours_are_export_errors(exported, damage):
    path, plan, lower, beta = exported
    model = onnx.load(path)
    damage(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError):
        qinvert.verify(path, plan, lower, beta=beta)


def test_plain_and_factored_graphs_are_told_apart(exported, tmp_path):
    path, plan, lower, beta = exported
    plain = qinvert.calibrate((lower, beta), target="int-ops")
    qinvert.export(plain, tmp_path / "p.onnx")
    with pytest.raises(ExportError, match="no input L or M and beta and output T"):
        qinvert.verify(tmp_path / "p.onnx", plan, lower, beta=beta)
    with pytest.raises(ExportError, match="no input L or M and output T"):
        qinvert.verify(path, plain, lower)


def test_steps_are_counted_on_the_grid_of_w(exported):
    path, plan, lower, beta = exported
    model = onnx.load(path)
    # One step of W, everywhere below the diagonal.
    step = np.tril(np.full((1, 1, 16, 16), plan.layer().output.scale, np.float32), -1)
    model.graph.initializer.append(onnx.numpy_helper.from_array(step, "step"))
    (last,) = [node for node in model.graph.node if node.name == "T/strictly_lower"]
    added = onnx.helper.make_node("Add", [last.input[0], "step"], ["shifted"], name="shifted")
    last.input[0] = "shifted"
    model.graph.node.insert(len(model.graph.node) - 2, added)
    onnx.save(model, path)
    with pytest.raises(VerificationError, match=r"in 1440 of 3072 values, by up to 1(\.\d+)? steps"):
        qinvert.verify(path, plan, lower, beta=beta)
