"""How models are loaded: where, in what type, and spread over memory and disk."""

import pytest
import tiny_models
import torch

import qinvert
from qinvert.calibration.model_digest import weights_digest
from qinvert.errors import InputError, MissingDependencyError
from qinvert.pretrained import Loading, load_pretrained

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    layers = tiny_models.of_layers("linear_attention", "full_attention")
    tiny_models.build("qwen3_5", **layers).save_pretrained(path)
    return path


def test_an_offloaded_model_gives_the_plan_of_the_whole_one_byte_for_byte(folder, tmp_path):
    pytest.importorskip("accelerate")
    tokens = torch.randint(0, tiny_models.VOCABULARY, (2, 128), generator=torch.Generator().manual_seed(0))
    spread = {
        "model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
        "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    loading = Loading(device_map=spread, offload_folder=str(tmp_path))
    whole, parts = load_pretrained(folder), load_pretrained(folder, loading)
    assert any(parameter.is_meta for parameter in parts.parameters())
    plans = [qinvert.calibrate(m, tokens, method="block_merge", bits=8) for m in (whole, parts)]
    assert plans[0].to_bytes() == plans[1].to_bytes()
    with torch.no_grad():
        whole.model.layers[0].linear_attn.A_log += 1
    assert weights_digest(whole) != weights_digest(parts)


def test_weights_have_the_type_that_was_asked_for(folder):
    for name in ("bfloat16", "float32"):
        assert load_pretrained(folder, Loading(dtype=name)).dtype == getattr(torch, name)
    assert load_pretrained(folder, Loading(dtype="auto")).dtype == torch.float32


def test_every_process_takes_its_own_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Loading(device="auto").place == Loading(device="cuda").place == torch.device("cuda", 1)
    assert Loading().place == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match=r"process 2 of this machine .* there are 2; start fewer"):
        _ = Loading(device="cuda").place


def test_without_a_card_auto_is_the_cpu_and_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert Loading(device="auto").place == torch.device("cpu")
    with pytest.raises(InputError, match="there are 0"):
        _ = Loading(device="cuda").place


@pytest.mark.parametrize(
    "options",
    [{"device": "tpu"}, {"dtype": "float16"}, {"device_map": "balanced"}],
    ids=lambda o: next(iter(o)),
)
def test_unknown_options_are_refused(options):
    with pytest.raises(InputError, match=r"is unknown; use"):
        Loading(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"device": "cuda", "device_map": "auto"},
            "device 'cuda' is for a whole model",
        ),
        ({"device": "auto", "device_map": {"": "cpu"}}, "device 'auto' is for a whole model"),
        ({"offload_folder": "weights"}, "offload_folder is for weights that device_map='auto'"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message):
    with pytest.raises(InputError, match=f"{message}.*leave"):
        Loading(**options)


def test_a_device_map_without_accelerate_says_what_to_install(monkeypatch, folder):
    monkeypatch.setattr("qinvert.pretrained.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'qinvert\[offload\]'"):
        load_pretrained(folder, Loading(device_map="auto"))


class ReachedError(Exception):
    """The model was opened, and the work begins."""


def test_a_folder_is_taken_where_a_model_is(folder, tmp_path, monkeypatch):
    model = load_pretrained(folder)
    tokens = torch.randint(0, tiny_models.VOCABULARY, (2, 128), generator=torch.Generator().manual_seed(0))
    plan = qinvert.calibrate(str(folder), tokens, method="block_merge", bits=8)
    assert plan.to_bytes() == qinvert.calibrate(model, tokens, method="block_merge", bits=8).to_bytes()
    assert qinvert.simulate(plan, folder, tokens).to_dict() == qinvert.simulate(plan, model, tokens).to_dict()
    ((_, found),) = qinvert.capture(folder, tokens)
    ((_, expected),) = qinvert.capture(model, tokens)
    assert torch.equal(found, expected)
    evaluations = [qinvert.evaluate(given, plan, tokens).to_dict() for given in (str(folder), model)]
    assert evaluations[0] == evaluations[1]

    def reached(*_, **__):
        raise ReachedError

    monkeypatch.setattr("qinvert.export.whole_models.export_model.trace", reached)
    monkeypatch.setattr("qinvert.export.deployment.deploy.build_graphs", reached)
    with pytest.raises(ReachedError):
        qinvert.export_model(str(folder), plan, tokens, tmp_path / "m.onnx")
    step = qinvert.calibrate(folder, tokens, scope="chunk", min_sqnr_db=0)
    with pytest.raises(ReachedError):
        qinvert.deploy(folder, step, tmp_path / "out")
