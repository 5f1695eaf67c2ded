"""The verbs that write, run and verify deployed folders, and what each refuses in one line."""

import json
import shutil
from unittest.mock import patch

import numpy as np
import pytest
from click.testing import CliRunner
from deployments import CACHE, TOKENS

import qinvert
from qinvert.cli.app import cli

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def refused(*arguments):
    """The one line of an error that ends with code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    text = result.output.strip()
    assert text.startswith("qinvert: "), text
    assert text.count("\n") == 0, text
    return text


@pytest.fixture(scope="module")
def plan(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    tiny.plan.save(path)
    return path


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.npz"
    np.savez(path, input_ids=TOKENS.numpy())
    return path


@pytest.fixture
def traced(tiny):
    """Deploy from the graphs that are traced already."""
    with patch("qinvert.export.deployment.deploy.build_graphs", lambda *_: tiny.graphs):
        yield


@pytest.fixture
def damaged(tiny, tmp_path):
    """Return a copy of the deployment whose manifest has other values."""

    def change(**values):
        folder = shutil.copytree(tiny.folder, tmp_path / "copy")
        manifest = json.loads((folder / "manifest.json").read_bytes()) | values
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return change


@pytest.mark.usefixtures("traced")
def test_deploy_writes_what_the_library_writes(tiny, plan, tmp_path):
    result = run("deploy", tiny.source, "--plan", plan, "--cache", CACHE, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "6 states, windows of 64 tokens, caches of 256 tokens" in result.output
    assert "prefill.onnx" in result.output
    for path in tiny.folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert f"wrote {tmp_path / 'out'}: 6 states" in result.output
    again = run("deploy", tiny.source, "--plan", plan, "--cache", CACHE, "-o", tmp_path / "out")
    assert f"replaced {tmp_path / 'out'}: 6 states" in again.output


@pytest.mark.usefixtures("traced")
def test_deploy_quantizes_weights_under_a_finished_plan(tiny, plan, tokens, tmp_path):
    arguments = (tiny.source, "--plan", plan, "--data", tokens, "--cache", CACHE, "--weights", "w8")
    result = run("deploy", *arguments, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    graphs = json.loads(result.stdout)["graphs"]
    assert graphs["decode.onnx"]["projections"]["weights"].startswith("int8")


def test_deploy_refuses_in_one_line(tiny, plan, tokens, tmp_path):
    out = tmp_path / "out"
    assert "there is no 'nowhere'" in refused("deploy", "nowhere", "-o", out)
    assert "--data" in refused("deploy", tiny.source, "-o", out)
    assert "hexagon-v99" in refused(
        "deploy", tiny.source, "--plan", plan, "--hardware", "hexagon-v99", "-o", out
    )
    # Without quantized weights nothing is calibrated under a finished plan.
    for option in (("--data", tokens), ("--seq-len", 64), ("--sequences", 3), ("--seed", 1)):
        said = refused("deploy", tiny.source, "--plan", plan, *option, "-o", out)
        assert f"for --weights w8 or w4 only; leave out {option[0]}" in said
    assert "--data" in refused("deploy", tiny.source, "--plan", plan, "--weights", "w8", "-o", out)
    assert "cache 0" in refused("deploy", tiny.source, "--plan", plan, "--cache", 0, "-o", out)
    assert "recall" not in refused("deploy", tiny.source, "--plan", tmp_path / "none.json", "-o", out)
    assert not out.exists()
    assert run("deploy", tiny.source, "--plan", plan, "--weights", "w2", "-o", out).exit_code == 2


def test_deploy_leaves_other_folders_and_files_alone(tiny, plan, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    assert "other files" in refused("deploy", tiny.source, "--plan", plan, "-o", tmp_path)
    assert "mine.txt" in refused("deploy", tiny.source, "--plan", plan, "-o", tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_run_continues_token_ids_as_the_library_does(tiny):
    result = run("run", tiny.folder, "--tokens", "3, 14,15", "--max-new-tokens", 4, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["prompt_tokens"] == 3
    assert found["tokens"] == qinvert.Deployment(tiny.folder, threads=1).generate([3, 14, 15], 4)


def test_run_refuses_in_one_line(tiny, tmp_path, damaged):
    assert "manifest.json" in refused("run", tmp_path / "nowhere", "--tokens", "1")
    assert "either --prompt" in refused("run", tiny.folder)
    assert "either --prompt" in refused("run", tiny.folder, "--tokens", "1", "--prompt", "a")
    assert "3,140,67" in refused("run", tiny.folder, "--tokens", "1,x")
    assert "vocabulary has 64" in refused("run", tiny.folder, "--tokens", "64")
    assert "larger cache" in refused("run", tiny.folder, "--tokens", ",".join(["1"] * 400))
    assert "max_new_tokens" in refused("run", tiny.folder, "--tokens", "1", "--max-new-tokens", 0)
    assert "qinvert deploy" in refused("run", damaged(version=9), "--tokens", "1")


@pytest.mark.parametrize(
    "values", [{"states": []}, {"states": [1]}, {"chunk": 0}, {"window": 7, "chunks": "2"}, {"end_tokens": 1}]
)
def test_broken_manifests_are_refused_in_one_line(damaged, values):
    folder = damaged(**values)
    assert "deploy again" in refused("run", folder, "--tokens", "1") or "qinvert deploy" in refused(
        "verify", folder
    )


def test_graphs_that_do_not_open_are_refused_in_one_line(damaged):
    folder = damaged()
    (folder / "decode.onnx").write_bytes(b"damaged")
    assert "decode.onnx" in refused("run", folder, "--tokens", "1")
    (folder / "decode.onnx").unlink()
    assert "decode.onnx" in refused("run", folder, "--tokens", "1")


def test_verify_prints_how_far_the_graphs_are(tiny):
    result = run("verify", tiny.folder)
    assert result.exit_code == 0, result.output
    for words in ("135 + 32", "unoptimized", "optimized", "1.000"):
        assert words in result.output
    rows = json.loads(run("verify", tiny.folder, "--model", tiny.source, "--json").stdout)["verified"]
    assert len(rows) == 10
    assert max(row["kl"] for row in rows) < 1e-4


def test_verify_refuses_in_one_line(tiny, tmp_path, damaged):
    folder = tiny.folder
    assert "plan.json" in refused("verify", tmp_path / "nowhere")
    assert "there is no 'nowhere'" in refused("verify", folder, "--model", "nowhere")
    assert "another model" in refused("verify", folder, "--model", "recall")
    assert "is a deployment" in refused("verify", folder, "--min-sqnr", 20)
    assert "onnxruntime" in refused("verify", folder, "--runtime", "openvino")
    assert "pass --model" in refused("verify", damaged(source=None))
