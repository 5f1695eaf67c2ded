"""Quantized weights of projections, MLPs and the head; the planned layers are what they were."""

import json
import logging

import numpy as np
import onnx
import pytest
import torch
from deployments import TOKENS
from onnx import numpy_helper
from tiny_models import VOCABULARY

import qinvert
from qinvert import ExportError, InputError, VerificationError
from qinvert.export.deployment.graphs import FORBIDDEN
from qinvert.export.deployment.options import DeployOptions
from qinvert.export.deployment.products import FLOAT, products, same_products
from qinvert.export.deployment.verify_deployment import verify_deployment
from qinvert.export.deployment.weights import rows_of

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")

LAYER = "model.layers.0.linear_attn/"
#: Projections of the delta-rule layer but for beta and the decay, of attention, two MLPs, and the head.
PRODUCTS = 3 + 4 + 6 + 1


@pytest.fixture(scope="module", params=["w8", "w4"])
def quantized(request, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "out"
    tiny.deploy(folder, weights=request.param, data=TOKENS)
    return request.param, folder


def step_of(path):
    """Nodes of the planned layer, with the bytes of their constants."""
    model = onnx.load(path)
    constants = {x.name: numpy_helper.to_array(x).tobytes() for x in model.graph.initializer}
    return {
        node.output[0]: (
            node.op_type,
            [constants.get(name, name) for name in node.input if name in constants or LAYER in name],
            [attribute.SerializeToString() for attribute in node.attribute],
        )
        for node in model.graph.node
        if node.output[0].startswith(LAYER)
    }


@pytest.mark.parametrize("name", ["prefill.onnx", "decode.onnx"])
def test_planned_layers_keep_every_node_and_constant(tiny, quantized, name):
    before = step_of(tiny.folder / name)
    assert len(before) > 150
    assert step_of(quantized[1] / name) == before


@pytest.mark.parametrize("name", ["prefill.onnx", "decode.onnx"])
def test_every_operator_is_one_of_onnx(quantized, name):
    model = onnx.load(quantized[1] / name)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert not {node.op_type for node in model.graph.node} & FORBIDDEN
    assert not {entry.key for entry in model.metadata_props} & {"onnx.infer"}


def test_weights_are_integers_with_a_scale_for_each_channel_or_block(quantized):
    weights, folder = quantized
    graph = onnx.load(folder / "prefill.onnx").graph
    constants = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    writers = {node.output[0]: node for node in graph.node}
    head = next(
        node for node in graph.node if node.op_type == "MatMul" and node.output[0].startswith("logits")
    )
    given, weight = (writers[name] for name in head.input)
    assert given.op_type == weight.op_type == "DequantizeLinear"
    stored, scale, zero = (constants[name] for name in weight.input)
    assert stored.dtype.name == {"w8": "int8", "w4": "int4"}[weights]
    assert stored.shape == (32, VOCABULARY)
    assert scale.shape == ((VOCABULARY,) if weights == "w8" else (1, VOCABULARY))
    assert not zero.any()
    assert constants[given.input[2]].dtype == np.int16


def test_weights_are_the_models_rounded_to_the_nearest(tiny, quantized):
    weights, folder = quantized
    graph = onnx.load(folder / "decode.onnx").graph
    constants = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    stored = []
    for node in graph.node:
        scale = constants.get(node.input[1]) if node.op_type == "DequantizeLinear" else None
        if scale is not None and scale.ndim:
            rounded = constants[node.input[0]].astype(np.float32)
            rows = np.repeat(np.atleast_2d(scale), 32 if weights == "w4" else len(rounded), 0)
            stored.append(rounded * rows[: len(rounded)])
    matrices = [m.weight.detach().numpy().T for m in tiny.model.modules() if isinstance(m, torch.nn.Linear)]
    largest = {"w8": 127, "w4": 7}[weights]
    assert len(stored) == PRODUCTS
    for found in stored:
        alike = [m for m in matrices if m.shape == found.shape]
        best = min(float(np.abs(m - found).max() / np.abs(m).max()) for m in alike)
        assert best < 0.51 / largest


def test_gates_norms_and_convolutions_stay_in_float(tiny, quantized):
    marked = [node for node in tiny.graphs[0].model.graph if FLOAT in node.meta]
    assert [node.op_type for node in marked] == ["MatMul", "MatMul"]
    assert {tuple(node.inputs[1].shape) for node in marked} == {(32, 4)}
    graph = onnx.load(quantized[1] / "prefill.onnx").graph
    initializers = {x.name for x in graph.initializer}
    floats = [
        n for n in graph.node if n.op_type == "MatMul" and n.input[1] in initializers and "/" not in n.name
    ]
    assert [node.name for node in floats] == [node.name for node in marked]
    # They read what they read before, and not the grid of the products beside them.
    assert {node.input[0] for node in floats} == {marked[0].inputs[0].name}
    convolution = next(node for node in graph.node if node.op_type == "Conv")
    assert convolution.input[1] in initializers


def test_the_manifest_says_what_runs_in_which_type(tiny, quantized):
    weights, folder = quantized
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["weights"] == weights
    for graph in manifest["graphs"].values():
        kind = {"w8": "int8", "w4": "int4"}[weights]
        assert graph["projections"]["nodes"] == PRODUCTS
        assert graph["projections"]["weights"].startswith(kind)
        assert graph["projections"]["activations"].startswith("int16")
        assert (graph["linear_attention"], graph["elsewhere"]) == ("integers by the plan", "float32")
    plain = json.loads((tiny.folder / "manifest.json").read_bytes())
    assert plain["graphs"]["decode.onnx"]["projections"]["weights"] == "float32"


def test_encodings_name_channels_and_leave_out_blocks_where_a_tool_has_none(quantized):
    weights, folder = quantized
    entries = json.loads((folder / "prefill.aimet.json").read_bytes())["encodings"]
    several = [entry for entry in entries if isinstance(entry["y_scale"], list)]
    assert len(several) == PRODUCTS
    assert {entry.get("block_size") for entry in several} == {None if weights == "w8" else 32}
    assert {entry["output_dtype"] for entry in several} == {"int8" if weights == "w8" else "int4"}
    overrides = json.loads((folder / "prefill.onnxruntime.json").read_bytes())
    assert sum(len(entry) > 1 for entry in overrides.values()) == (PRODUCTS if weights == "w8" else 0)


def test_verification_knows_the_weights_of_the_graphs(tiny, quantized):
    checks = verify_deployment(quantized[1], tiny.model, TOKENS[0].numpy(), lengths=(65,))
    for check in checks:
        assert check.logits < 1e-2
        # The patched model has the weights in float32.
        assert check.kl < {"w8": 1e-3, "w4": 0.1}[quantized[0]]


def test_verification_sees_another_weight(tiny, quantized, tmp_path):
    for path in quantized[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    graph = onnx.load(tmp_path / "decode.onnx")
    weight = next(x for x in graph.graph.initializer if "lm_head" in x.name or x.dims == [32, VOCABULARY])
    weight.raw_data = bytes([weight.raw_data[0] ^ 2]) + weight.raw_data[1:]
    onnx.save(graph, tmp_path / "decode.onnx")
    with pytest.raises(VerificationError, match="rounded to the nearest"):
        verify_deployment(tmp_path, tiny.model, TOKENS[0].numpy(), lengths=(1,))


def test_activations_of_eight_bits(tiny, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tiny.deploy(tmp_path / "out", weights="w8", activation_bits=8, data=TOKENS)
    assert not caplog.records
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["graphs"]["prefill.onnx"]["projections"]["activations"].startswith("int8")
    (check, _) = verify_deployment(tmp_path / "out", tiny.model, TOKENS[0].numpy(), lengths=(65,))
    assert check.logits < 2e-2


def test_rows_have_no_padding_and_are_few():
    batch = {
        "input_ids": torch.arange(8).reshape(2, 4),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [0] * 4]),
    }
    assert [row.tolist() for row in rows_of([batch])] == [[1, 2, 3]]
    assert len(list(rows_of([{"input_ids": torch.zeros(99, 2)}]))) == 16


def test_graphs_with_other_products_are_refused(tiny):
    prefill, decode = (graph.model for graph in tiny.graphs)
    assert len(same_products(prefill, decode)) == len({*same_products(prefill, decode)})
    node = products(decode)[0]
    node.meta[FLOAT] = True
    with pytest.raises(ExportError, match="other weights"):
        same_products(prefill, decode)
    del node.meta[FLOAT]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"weights": "w2"}, ExportError, "none, w8 or w4"),
        ({"weights": "w8", "activation_bits": 4, "data": TOKENS}, ExportError, "8 or 16"),
        ({"weights": "w8"}, InputError, "pass data"),
        ({"data": TOKENS}, InputError, "leave it out"),
    ],
)
def test_what_cannot_be_quantized_is_refused_before_the_work(tiny, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        qinvert.deploy(tiny.model, tiny.plan, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_options_know_the_operator_set_of_their_types():
    assert DeployOptions().opset is None
    assert DeployOptions(weights="w4").opset == 21
