"""Whole decoders as ONNX."""

import collections
import json

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from tiny_models import VOCABULARY, build, of_layers

import qinvert
from qinvert import recall
from qinvert.calibration.patching import run_model
from qinvert.cli.app import cli
from qinvert.errors import ExportError, InputError, PlanError

pytest.importorskip("transformers", reason="pip install 'qinvert[model]'")
pytest.importorskip("onnxscript", reason="pip install 'qinvert[model]'")
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTHS = (1, 63, 64, 65, 128, 200, 256)
TOLERANCE = 2e-6


class Exported:
    def __init__(self, model, tokens, path, write):
        self.model, self.tokens = model, tokens
        self.plan = qinvert.calibrate(model, tokens[:8], bits=8)
        self.written = write(model, self.plan, path)
        self.proto = onnx.load(path)
        self.session = onnxruntime.InferenceSession(path)

    def run(self, tokens):
        return torch.from_numpy(self.session.run(["logits"], {"input_ids": tokens.numpy()})[0])

    def simulated(self, tokens):
        with qinvert.patched(self.model, self.plan):
            return run_model(self.model, {"input_ids": tokens})


@pytest.fixture(scope="module")
def recalled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recall")

    def write(_, plan, path):
        plan.save(folder / "plan.json")
        arguments = ["export-model", folder / "plan.json", "--model", "recall", "-o", path, "--json"]
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    model, tokens = recall.load_model(), recall.sequences(16, seed=1)
    return Exported(model, tokens, folder / "model.onnx", write)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    tokens = torch.randint(0, VOCABULARY, (8, 256), generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("qwen") / "model.onnx"
    model = build("qwen3_5", **of_layers(*["linear_attention"] * 3, "full_attention"))
    # The example has neither two sequences nor a whole chunk, and says nothing about lengths.
    return Exported(model, tokens, path, lambda m, p, to: qinvert.export_model(m, p, tokens[:1, :7], to))


@pytest.fixture(scope="module")
def single():
    """One layer of each kind: quick to trace."""
    model = build("qwen3_5", **of_layers("linear_attention", "full_attention"))
    tokens = torch.randint(0, VOCABULARY, (4, 256), generator=torch.Generator().manual_seed(2))
    return model, tokens, qinvert.calibrate(model, tokens, bits=8, granularity="head")


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def nodes(graph):
    return sum(1 + sum(nodes(a.g) for a in node.attribute if a.HasField("g")) for node in graph.node)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_recall_model_is_right_at_every_length(recalled, length):
    tokens = recalled.tokens[:1, :length]
    assert error(recalled.run(tokens), recalled.simulated(tokens)) < TOLERANCE


@pytest.mark.parametrize("length", LENGTHS)
def test_a_model_with_attention_is_right_at_every_length(qwen, length):
    tokens = qwen.tokens[:1, :length]
    actual, expected = qwen.run(tokens), qwen.simulated(tokens)
    assert (actual - expected).abs().max() < TOLERANCE
    if length > 1:
        # What it is right about: the plan's error is larger.
        assert (run_model(qwen.model, {"input_ids": tokens}) - expected).abs().max() > 50 * TOLERANCE


def test_the_recall_model_answers_in_onnxruntime(recalled):
    logits = torch.cat([recalled.run(part) for part in recalled.tokens.split(4)])
    assert recall.accuracy(logits, recalled.tokens) == 1.0


def test_the_command_compares_with_the_simulated_plan(recalled):
    found = recalled.written["differences"]
    assert list(found) == ["1", "65", "200"]
    # Random tokens are no task of the model: a rounding may fall on the other side.
    assert max(found.values()) < 1e-2
    assert found["1"] < TOLERANCE


def test_the_graph_is_small_and_names_every_layer(qwen):
    assert nodes(qwen.proto.graph) <= 1000
    names = [f"TriInv_model_layers_{i}_linear_attn" for i in range(3)]
    assert [f.name for f in qwen.proto.functions] == names
    calls = collections.Counter(node.op_type for node in qwen.proto.graph.node if node.domain == "qinvert")
    assert calls == dict.fromkeys(names, 1)
    assert [d.dim_param for d in qwen.proto.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        "sequence",
    ]


def test_the_functions_hold_integer_programs_that_can_be_inlined(qwen):
    kinds = {node.op_type for function in qwen.proto.functions for node in function.node}
    assert {"QuantizeLinear", "DequantizeLinear", "MatMul"} <= kinds
    flat = onnx.inliner.inline_local_functions(qwen.proto)
    assert not flat.functions
    assert {node.domain for node in flat.graph.node} == {""}
    tokens = qwen.tokens[:2, :100]
    (actual,) = onnxruntime.InferenceSession(flat.SerializeToString()).run(
        None, {"input_ids": tokens.numpy()}
    )
    assert np.array_equal(actual, qwen.run(tokens).numpy())


def test_a_fixed_length_need_not_be_whole_chunks(single, tmp_path):
    model, tokens, plan = single
    written = qinvert.export_model(model, plan, tokens[:1, :70], tmp_path / "m.onnx", dynamic=False)
    (given,) = written.graph.input
    assert [d.dim_value for d in given.type.tensor_type.shape.dim] == [1, 70]
    # A plan per head has a function for each head.
    assert [f.name[-7:] for f in written.functions] == [f"_head_{i}" for i in range(4)]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (logits,) = session.run(None, {"input_ids": tokens[:1, :70].numpy()})
    with qinvert.patched(model, plan):
        expected = run_model(model, {"input_ids": tokens[:1, :70]})
    assert np.abs(logits - expected.numpy()).max() < TOLERANCE


def test_the_exporter_of_transformers_takes_it_as_a_quantizer(single):
    exporters = pytest.importorskip("transformers.exporters.exporter_onnx", reason="transformers >= 5.23")
    from qinvert.export.quantizer import TriangularQuantizer

    model, tokens, _ = single
    quantizer = TriangularQuantizer(calibration_dataset=[{"input_ids": tokens}], bits=8)
    inputs = {"input_ids": tokens[:2, :128], "attention_mask": torch.ones(2, 128, dtype=torch.int64)}
    config = exporters.OnnxConfig(dynamic=False, quantizer=quantizer)
    with quantizer.tracing(model):
        exported = exporters.OnnxExporter().export(model, inputs, config=config)
    assert [name for _, name, _ in exported.program.functions] == ["TriInv_model_layers_0_linear_attn"]
    with qinvert.patched(model, quantizer.plan):
        expected = run_model(model, inputs)
    assert (torch.as_tensor(exported(**inputs)["logits"]) - expected).abs().max() < TOLERANCE


def test_a_quantizer_without_its_block_is_refused(single):
    pytest.importorskip("transformers.exporters", reason="transformers >= 5.23")
    import onnx_ir

    from qinvert.export.quantizer import TriangularQuantizer

    _, _, plan = single
    empty = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    with pytest.raises(ExportError, match="does not call any layer"):
        TriangularQuantizer(plan).quantize(onnx_ir.serde.deserialize_model(empty), {}, "onnx")
    with pytest.raises(ExportError, match="pass a plan"):
        TriangularQuantizer()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"opset": 17}, ExportError, "19 or later"),
        ({"profile": "none"}, ExportError, "none"),
        ({"example": {"input_ids": torch.zeros(1, 4), "mask": torch.zeros(1, 5)}}, InputError, "integers"),
        ({"example": {"input_ids": torch.zeros(1, 4).long(), "mask": 1}}, InputError, "mask of the example"),
        ({"model": torch.nn.Linear(2, 2)}, InputError, "no delta-rule layer"),
    ],
)
def test_what_cannot_be_exported_is_refused(single, tmp_path, options, kind, message):
    model, tokens, plan = single
    given = {"model": model, "plan": plan, "example": tokens, "path": tmp_path / "m.onnx"} | options
    with pytest.raises(kind, match=message):
        qinvert.export_model(**given)
    assert not list(tmp_path.iterdir())


def test_a_plan_of_another_model_is_refused(qwen, single, tmp_path):
    _, tokens, plan = single
    with pytest.raises(PlanError, match="lacks layer"):
        qinvert.export_model(qwen.model, plan, tokens, tmp_path / "m.onnx")


def test_everything_is_as_before_after_an_export(single):
    model, tokens, _ = single
    assert model.config.use_cache
    assert run_model(model, {"input_ids": tokens}).isfinite().all()


def test_autocast_changes_no_graph(single, tmp_path):
    model, tokens, plan = single
    for name, autocast in (("plain", False), ("cast", True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            qinvert.export_model(model, plan, tokens, tmp_path / name, dynamic=False)
    assert (tmp_path / "cast").read_bytes() == (tmp_path / "plain").read_bytes()
