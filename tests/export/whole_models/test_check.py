"""Graphs of whole models that compute something else than the model are not written."""

import dataclasses
import json
import logging
import re

import onnx
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCABULARY, build, of_layers

import qinvert
from qinvert.calibration.patching import run_model
from qinvert.cli.app import cli
from qinvert.errors import ExportError, InputError, VerificationError
from qinvert.export.whole_models import check, export_model
from qinvert.export.whole_models.check import LowestIndexFirst, ModelCheck, difference
from qinvert.profiles import find_profile

pytest.importorskip("transformers", reason="pip install 'qinvert[model]'")
pytest.importorskip("onnxscript", reason="pip install 'qinvert[model]'")
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTHS = (1, 63, 64, 65, 128, 200, 256)
TOKENS = torch.randint(0, VOCABULARY, (4, 256), generator=torch.Generator().manual_seed(2))


def padded(tokens, count):
    mask = torch.ones_like(tokens)
    mask[:, :count] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@dataclasses.dataclass
class Written:
    model: torch.nn.Module
    plan: qinvert.Plan
    proto: onnx.ModelProto
    folder: object

    def check(self, *lengths, plan=None, padding=0, **options):
        taken = [given.name for given in self.proto.graph.input]
        batches = [padded(TOKENS[:1, :length], padding) for length in lengths]
        batches = [{name: batch[name] for name in taken} for batch in batches]
        options |= {"model": self.model, "plan": plan or self.plan, "batches": batches}
        ModelCheck(profile=find_profile(self.plan.target), **options)(self.proto, self.folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One layer of each kind, of any length, with a plan per head that is too coarse for its purpose."""
    model = build("qwen3_5", **of_layers("linear_attention", "full_attention"))
    plan = qinvert.calibrate(model, TOKENS, bits=4, granularity="head", min_sqnr_db=0)
    folder = tmp_path_factory.mktemp("written")
    # Cut to one token, this example is padding only: nothing to compare, and no error.
    proto = qinvert.export_model(model, plan, padded(TOKENS[:1, :7], 2), folder / "m.onnx")
    return Written(model, plan, proto, folder)


@pytest.fixture(scope="module")
def layer():
    """A single layer: the quickest to export."""
    model = build("qwen3_5", **of_layers("linear_attention"), use_cache=False)
    return model, qinvert.calibrate(model, TOKENS, bits=8)


def otherwise(module, change):
    """Have a module's output changed wherever it is not traced."""

    def hook(_module, _inputs, output):
        return output if torch.compiler.is_exporting() else change(output)

    return module.register_forward_hook(hook)


@pytest.fixture
def longer(written):
    """A model that does something more with more than 128 tokens, as a trace of fewer never sees."""
    hook = otherwise(written.model.model.layers[0], lambda x: x * (1.05 if x.shape[1] > 128 else 1))
    yield
    hook.remove()


def test_a_right_graph_passes_at_every_length_however_coarse_the_plan(written):
    # Float32 sums in another order, and nothing else.
    written.check(*LENGTHS, tolerance=1e-5)
    written.check(65, 200, padding=40, tolerance=1e-5)


def test_a_branch_that_the_trace_froze_is_found(written, longer):
    written.check(1, 128)
    with pytest.raises(ExportError, match=r"input_ids \[1, 200\]: logits differ by .* the tolerance 0.001"):
        written.check(200)


def test_what_padding_holds_is_no_matter(written):
    hook = otherwise(written.model.lm_head, lambda x: torch.cat([x[:, :40] + 1, x[:, 40:]], dim=1))
    written.check(70, padding=40)
    with pytest.raises(ExportError, match="logits differ"):
        written.check(70, padding=39)
    hook.remove()


def test_the_first_layer_that_differs_is_named(written):
    hook = otherwise(written.model.model.embed_tokens, lambda x: x.flip(-1))
    with pytest.raises(ExportError, match=r"L of model\.layers\.0.*head_0 is the first that differs"):
        written.check(70)
    hook.remove()


def test_logits_that_are_not_numbers_are_found(written):
    hook = otherwise(written.model.lm_head, lambda x: x * float("nan"))
    with pytest.raises(ExportError, match="logits differ by up to nan"):
        written.check(5)
    hook.remove()


def test_a_function_of_another_plan_is_found(written):
    other = qinvert.calibrate(written.model, TOKENS, bits=8, granularity="head")
    with pytest.raises(VerificationError, match="TriInv_model_layers_0_linear_attn_head_0"):
        written.check(70, plan=other)


def test_functions_that_take_beta_are_checked(layer, tmp_path):
    model, _ = layer
    plan = qinvert.calibrate(model, TOKENS, factored=True)
    assert plan.layer().program.inverse_ports.factored
    proto = qinvert.export_model(model, plan, TOKENS[:1, :70], tmp_path / "m.onnx", dynamic=False)
    other = qinvert.calibrate(model, TOKENS[:, :70] % 3, factored=True)
    with pytest.raises(VerificationError, match="instead of"):
        Written(model, other, proto, tmp_path).check(70)


def test_matrices_of_another_number_are_found(written):
    # The model in PyTorch meets three chunks, the graph two.
    hook = otherwise(written.model.model.embed_tokens, lambda x: x.repeat(1, 2, 1)[:, :130])
    with pytest.raises(ExportError, match=r"L of .*head_0 in the exported graph is \[1, 2, 64, 64\]"):
        written.check(70)
    hook.remove()


def test_without_onnxruntime_there_is_a_warning_and_no_check(written, longer, monkeypatch, caplog):
    monkeypatch.setattr(check, "can_run", lambda: False)
    with caplog.at_level(logging.WARNING, "qinvert"):
        written.check(200)
    assert "onnxruntime is not installed" in caplog.text


def test_what_onnxruntime_does_not_load_is_an_error(written):
    proto = onnx.ModelProto()
    proto.CopyFrom(written.proto)
    proto.opset_import[0].version = 10_000
    with pytest.raises(ExportError, match=r"onnxruntime cannot load .*check=False"):
        dataclasses.replace(written, proto=proto).check(5)


def test_nothing_wrong_is_written_with_weights_beside(layer, tmp_path, monkeypatch):
    model, plan = layer
    monkeypatch.setattr(export_model, "MAX_BYTES", 0)
    given = {"example": TOKENS[:1, :70], "path": tmp_path / "m.onnx", "dynamic": False}
    hook = otherwise(model.model.norm, lambda x: 1.05 * x)
    with pytest.raises(ExportError, match=r"input_ids \[1, 70\]: logits differ"):
        qinvert.export_model(model, plan, **given)
    hook.remove()
    assert not list(tmp_path.iterdir())
    qinvert.export_model(model, plan, **given)
    name, data = sorted(file.name for file in tmp_path.iterdir())
    assert name == "m.onnx"
    assert re.fullmatch(r"m\.onnx\.[0-9a-f]{8}\.data", data)
    assert difference(tmp_path / "m.onnx", model, plan, 70) < 1e-5


def test_the_command_writes_nothing_wrong(layer, tmp_path, monkeypatch):
    model, plan = layer
    monkeypatch.setattr("qinvert.cli.export_model.load_model", lambda _: model)
    plan.save(tmp_path / "plan.json")
    path = tmp_path / "m.onnx"
    command = ["export-model", str(tmp_path / "plan.json"), "-o", str(path), "--model", "ours"]
    hook = otherwise(model.model.norm, lambda x: 1.05 * x)
    result = CliRunner().invoke(cli, [*command, "--length", "70"])
    hook.remove()
    assert result.exit_code == 2
    assert result.stderr.startswith("qinvert: the exported graph is not the model, at input_ids [1, 70]")
    assert result.stderr.count("\n") == 1
    assert not path.exists()


def test_the_command_checks_nothing_if_told_so(layer, tmp_path, monkeypatch):
    model, plan = layer
    asked = {}
    monkeypatch.setattr("qinvert.cli.export_model.load_model", lambda _: model)

    def write(_model, _plan, path, _length, **options):
        asked.update(options)
        written = onnx.helper.make_model(onnx.helper.make_graph([], "nothing", [], []))
        onnx.save(written, path)
        return written

    monkeypatch.setattr("qinvert.cli.export_model.write_model", write)
    plan.save(tmp_path / "plan.json")
    paths = [str(tmp_path / "plan.json"), "-o", str(tmp_path / "m.onnx")]
    result = CliRunner().invoke(cli, ["export-model", *paths, "--model", "ours", "--json", "--no-check"])
    assert asked["check"] is False
    assert json.loads(result.stdout)["differences"] == {}


@pytest.mark.parametrize(("dynamic", "remedy"), [(True, "dynamic=False"), (False, "export the layers")])
def test_a_model_that_cannot_be_traced_is_refused_in_one_line(layer, tmp_path, dynamic, remedy):
    model, plan = layer
    # How often it loops, or whether, depends on values.
    hook = model.model.norm.register_forward_hook(lambda _, __, x: x if len(x.nonzero()) // 2 > 0 else 2 * x)
    with pytest.raises(ExportError, match=rf"cannot trace the model: .*data-dependent.*{remedy}") as refused:
        qinvert.export_model(model, plan, TOKENS[:1, :70], tmp_path / "m.onnx", dynamic=dynamic)
    hook.remove()
    assert str(refused.value).isprintable()
    assert not list(tmp_path.iterdir())


def test_a_tolerance_that_is_none_is_refused(layer, tmp_path):
    model, plan = layer
    with pytest.raises(InputError, match="tolerance"):
        qinvert.export_model(model, plan, TOKENS, tmp_path / "m.onnx", tolerance=float("nan"))


def test_sparse_attention_is_right_but_for_ties(tmp_path):
    pytest.importorskip("transformers.models.glm5_next", reason="transformers >= 5.16")
    kinds = {"mlp_layer_types": ["dense"] * 2, "hc_sinkhorn_iters": 1}
    model = build("glm5_next", **of_layers("linear_attention", "full_attention"), **kinds)
    plan = qinvert.calibrate(model, TOKENS, bits=8)
    qinvert.export_model(model, plan, TOKENS[:1, :200], tmp_path / "m.onnx", dynamic=False)
    assert difference(tmp_path / "m.onnx", model, plan, 200) < 2e-6
    tokens = {"input_ids": TOKENS[:1, :200]}
    with LowestIndexFirst():
        lowest = run_model(model, tokens)
    # What the difference would be: PyTorch takes another of equal scores.
    assert (lowest - run_model(model, tokens)).abs().max() > 1e-2


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=40), st.data(), st.booleans())
def test_the_lower_index_of_equal_values_is_taken(values, data, largest):
    k = data.draw(st.integers(0, len(values)))
    expected = sorted(range(len(values)), key=lambda i: (-values[i] if largest else values[i], i))[:k]
    x = torch.tensor([values, values]).float()
    with LowestIndexFirst():
        found = torch.topk(x, k, largest=largest)
        across = x.T.topk(k, dim=0, largest=largest)
    assert found.indices.tolist() == [expected] * 2
    assert torch.equal(found.values, x.gather(1, found.indices))
    assert torch.equal(across.indices, found.indices.T)
