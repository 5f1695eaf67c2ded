"""A plan with one whole layer and one layer of heads goes wherever plans go."""

import re

import pytest
import torch

import qinvert
from qinvert import recall
from qinvert.calibration.head_names import entries_of, head_name
from qinvert.calibration.heads import plan_inverse
from qinvert.calibration.patching import run_model
from qinvert.errors import PlanError

pytest.importorskip("transformers")

LAYERS = [f"model.layers.{i}.linear_attn" for i in (0, 1)]
ENTRIES = [LAYERS[0], *(head_name(LAYERS[1], head) for head in (0, 1))]


def joined(whole, heads):
    layers = {LAYERS[0]: whole.layers[LAYERS[0]], **{name: heads.layers[name] for name in ENTRIES[1:]}}
    return qinvert.Plan(layers=layers, target=whole.target, provenance=whole.provenance)


@pytest.fixture(scope="module")
def model():
    return recall.load_model()


@pytest.fixture(scope="module")
def tokens():
    return recall.sequences(2)


@pytest.fixture(scope="module")
def plan(model, tokens):
    options = {"method": "block_merge", "bits": 8}
    whole, heads = (qinvert.calibrate(model, tokens, granularity=g, **options) for g in ("tensor", "head"))
    return joined(whole, heads)


@pytest.fixture(scope="module")
def steps(model, tokens):
    return joined(*(
        qinvert.calibrate(model, tokens[:, :130], scope="chunk", bits=8, granularity=g)
        for g in ("tensor", "head")
    ))  # fmt: skip


def test_entries_of_a_layer_are_its_own_or_those_of_its_heads(plan):
    assert [entries_of(plan, layer) for layer in LAYERS] == [ENTRIES[:1], ENTRIES[1:]]


def test_it_is_simulated_and_evaluated_entry_by_entry(model, tokens, plan):
    assert list(qinvert.simulate(plan, model, tokens).layers) == ENTRIES
    found = qinvert.compare(model, {"mixed": plan}, tokens, score=recall.accuracy)["mixed"]
    assert found.score == 1.0
    assert {layer: [h.head for h in errors.heads] for layer, errors in found.layers.items()} == {
        layer: [0, 1] for layer in LAYERS
    }


def test_every_layer_has_the_inverse_of_its_entries(model, tokens, plan):
    for layer, lower in qinvert.capture(model, tokens):
        expected = (
            plan.layers[layer].inverse(lower)
            if layer in plan.layers
            else torch.stack([plan.layers[head_name(layer, h)].inverse(lower[:, h]) for h in (0, 1)], 1)
        )
        assert torch.equal(plan_inverse(plan, layer, qinvert.systems.Systems(lower=lower)), expected)


def test_its_report_shows_each_head_once(model, tokens, plan, steps):
    for shown in (plan, steps):
        page = qinvert.report(shown, model, data=tokens[:, :130])
        heads = {f"{layer}, {head}" for layer in LAYERS for head in (0, 1)}
        text = re.sub(r"<[^>]+>", "\n", page.replace("<wbr>", ""))
        assert set(re.findall(r"^(model\.\S+, \d)$", text, re.MULTILINE)) == heads


def test_a_model_is_exported_with_a_call_for_each_entry(model, tokens, plan, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    given = tokens[:1, :70]
    written = qinvert.export_model(model, plan, given, tmp_path / "m.onnx", dynamic=False)
    assert len(written.functions) == len(ENTRIES)
    (logits,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"input_ids": given.numpy()})
    with qinvert.patched(model, plan):
        expected = run_model(model, {"input_ids": given})
    assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-2)


def test_steps_of_both_kinds_are_simulated_and_not_deployed(model, tokens, steps, tmp_path):
    assert list(qinvert.simulate(steps, model, tokens[:, :130]).steps) == ENTRIES
    found = qinvert.evaluate(model, steps, tokens[:, :130])
    assert list(found.layers) == LAYERS
    assert min(errors.out for errors in found.layers.values()) > 10
    with pytest.raises(PlanError, match="granularity='tensor'"):
        qinvert.deploy(model, steps, tmp_path / "out")
