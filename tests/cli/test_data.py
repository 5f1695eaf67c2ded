import json

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_models import build, of_layers

import qinvert
from qinvert.cli.app import cli
from qinvert.stress import stress_matrices


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("qinvert: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
    """A folder with an untrained model that reads bytes."""
    pytest.importorskip("transformers")
    heads = {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
    model = build("qwen3_5", vocab_size=256, **of_layers("linear_attention", "full_attention"), **heads)
    folder = tmp_path_factory.mktemp("byte-model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("It was the best of times, it was the worst of times.\n" * 40)
    return path


def test_the_whole_job_on_text(byte_model, text, tmp_path):
    plan, rows = tmp_path / "plan.json", tmp_path / "rows.jsonl"
    options = ("--seq-len", 128, "--num-samples", 3)
    calibrated = run("calibrate", byte_model, "--data", text, *options, "-o", plan, "--json")
    assert calibrated.exit_code in (0, 1), calibrated.output
    # Three sequences, two heads, two chunks.
    assert json.loads(calibrated.stdout)["layers"]["model.layers.0.linear_attn"]["matrices"] == 12
    # Without --model: that of the plan.
    found = json.loads(run("evaluate", plan, "--data", text, *options, "--json").stdout)
    assert found["tokens"] == 3 * 128
    rows.write_text("\n".join(json.dumps({"body": "some text " * 13}) for _ in range(4)))
    report = json.loads(run("simulate", plan, "--data", rows, "--column", "body", *options, "--json").stdout)
    assert report["layers"]["model.layers.0.linear_attn"]["matrices"] == 12
    assert "not text or input_ids; name the field" in refused("simulate", plan, "--data", rows)
    growth = json.loads(run("inspect", byte_model, "--data", text, "--seq-len", 64, "--json").stdout)
    assert growth["layers"]["model.layers.0.linear_attn"]["matrices"] == 2 * (53 * 40 // 64)


def test_data_that_cannot_be_read_is_one_line(byte_model, text, tmp_path):
    out = ("-o", tmp_path / "plan.json")
    assert "text, .jsonl, token ids" in refused("calibrate", byte_model, *out)
    assert "no such file" in refused("calibrate", byte_model, "--data", "nowhere.txt", *out)
    (tmp_path / "image").write_bytes(b"\x89PNG\r\n")
    assert "not UTF-8 text" in refused("calibrate", byte_model, "--data", tmp_path / "image", *out)
    assert "cannot load a tokenizer" in refused(
        "calibrate", byte_model, "--data", text, "--tokenizer", tmp_path, *out
    )
    assert "--seq-len" in refused("calibrate", byte_model, "--data", text, "--seq-len", 0, *out)
    assert "no tokenizer" in refused("calibrate", "recall", "--data", text, *out)
    assert not (tmp_path / "plan.json").exists()


@pytest.fixture
def matrices(tmp_path):
    np.savez(tmp_path / "L.npz", layer=stress_matrices("half_random", 4, 16).numpy())
    return tmp_path / "L.npz"


@pytest.fixture
def plan(tmp_path, matrices):
    qinvert.calibrate(str(matrices)).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


#: Every option of models and their data, with something else than its default.
OF_MODELS = {
    "--num-samples": 3,
    "--seq-len": 64,
    "--column": "text",
    "--split": "test",
    "--tokenizer": "folder",
    "--sequences": 3,
    "--device": "auto",
    "--dtype": "auto",
    "--device-map": "auto",
    "--offload-folder": "folder",
}


@pytest.mark.parametrize("option", OF_MODELS)
def test_options_of_models_are_refused_where_none_runs(option, matrices, plan, tmp_path, monkeypatch):
    # Refused before anything is measured.
    monkeypatch.setattr("qinvert.calibration.calibrate.calibrate", None)
    monkeypatch.setattr("qinvert.calibration.simulate.simulate", None)
    given, before = (option, OF_MODELS[option]), sorted(tmp_path.iterdir())
    for call in (
        ("calibrate", matrices, "-o", tmp_path / "other.json"),
        ("inspect", matrices),
        ("simulate", plan, "--data", matrices),
        ("report", plan, "--data", matrices, "-o", tmp_path / "page.html"),
    ):
        assert f"which no model reads; leave out {option}\n" in refused(*call, *given)
    assert f"no model runs; leave out {option}\n" in refused("inspect", "--stress", *given)
    assert f"holds its numbers; leave out {option}\n" in refused("inspect", plan, *given)
    page = ("report", plan, "-o", tmp_path / "page.html")
    assert f"without --data or --model; leave out {option}\n" in refused(*page, *given)
    assert sorted(tmp_path.iterdir()) == before


def test_options_of_data_are_refused_where_they_change_nothing(plan, text, tmp_path):
    out = ("-o", tmp_path / "other.json")
    said = refused("calibrate", "recall", "--num-samples", 3, "--tokenizer", "folder", *out)
    assert "there is no --data that would be read; leave out --num-samples, --tokenizer" in said
    assert "no sequences are generated; leave out --sequences" in refused(
        "calibrate", "recall", "--data", text, "--sequences", 3, *out
    )
    assert "leave out --data, --seed" in refused("inspect", plan, "--data", text, "--seed", 1)
    both = ("--device", "cuda", "--device-map", "auto")
    assert "device 'cuda' is for a whole model" in refused("calibrate", "recall", *both, *out)


def test_a_checkpoint_of_another_model_is_refused(byte_model, text, tmp_path):
    options = ("--data", text, "--seq-len", 128, "--num-samples", 3, "--checkpoint", tmp_path / "c")
    assert run("calibrate", byte_model, *options, "-o", tmp_path / "plan.json").exit_code in (0, 1)
    other = build("qwen3_5", vocab_size=256, **of_layers("linear_attention", "full_attention"),
                  linear_num_key_heads=1, linear_num_value_heads=2)  # fmt: skip
    next(other.parameters()).data[3, 1] += 1e-3
    other.save_pretrained(tmp_path / "other")
    out = ("-o", tmp_path / "second.json")
    assert "pass the same model" in refused("calibrate", tmp_path / "other", *options, *out)
    assert "pass the same model" in refused("calibrate", byte_model, *options, "--dtype", "bfloat16", *out)
    assert not (tmp_path / "second.json").exists()
