"""Whole decoders as ONNX."""

import collections

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch

import qinvert
from qinvert import recall
from qinvert.calibration.hooks import run_model

transformers = pytest.importorskip("transformers", reason="pip install 'qinvert[model]'")
pytest.importorskip("onnxscript", reason="pip install 'qinvert[model]'")
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTHS = (1, 63, 64, 65, 128, 200, 256)
VOCABULARY = 64
TOLERANCE = 2e-6


def tiny():
    """Qwen3.5 with three delta-rule layers and one of attention, random weights."""
    config = transformers.AutoConfig.for_model(
        "qwen3_5_text",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Exported:
    def __init__(self, model, tokens, folder, **options):
        self.model, self.tokens = model, tokens
        self.plan = qinvert.calibrate(model, tokens[:8], bits=8)
        self.path = folder / "model.onnx"
        self.proto = qinvert.export_model(model, self.plan, tokens[:1, :7], self.path, **options)
        self.session = onnxruntime.InferenceSession(self.path)

    def run(self, tokens):
        return torch.from_numpy(self.session.run(["logits"], {"input_ids": tokens.numpy()})[0])

    def simulated(self, tokens):
        with qinvert.patched(self.model, self.plan):
            return run_model(self.model, {"input_ids": tokens})


@pytest.fixture(scope="module")
def recalled(tmp_path_factory):
    return Exported(recall.load_model(), recall.sequences(16, seed=1), tmp_path_factory.mktemp("recall"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    tokens = torch.randint(0, VOCABULARY, (8, 256), generator=torch.Generator().manual_seed(1))
    return Exported(tiny(), tokens, tmp_path_factory.mktemp("qwen"))


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
