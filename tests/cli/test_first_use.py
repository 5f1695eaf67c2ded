"""What somebody meets who uses the command line for the first time."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

import qinvert
from qinvert import recall
from qinvert.calibration.data.token_batches import token_batches
from qinvert.calibration.data.tokenizers import find_tokenizer
from qinvert.cli.app import cli
from qinvert.cli.graph_folder import export_all
from qinvert.errors import InputError, PlanError
from qinvert.export.whole_models.tracing import NOTICES, _without_notices
from qinvert.stress import stress_matrices

#: Interrupts the process at its first import of a module.
INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {place!r}.split()[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    """Graphs of three layers, of which the first two return something else."""
    lower = {name: stress_matrices("half_random", 4, 16, seed) for seed, name in enumerate("abc")}
    plan = qinvert.calibrate(lower, target="int-ops", min_sqnr_db=0)
    export_all(plan, str(tmp_path))
    for name in "ab":
        model = onnx.load(tmp_path / f"{name}.onnx")
        tensor = next(t for t in model.graph.initializer if onnx.numpy_helper.to_array(t).dtype == np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 2, tensor.name))
        onnx.save(model, tmp_path / f"{name}.onnx")
    return tmp_path


def test_verify_says_what_became_of_every_layer(folder):
    result = invoke("verify", folder, "--json")
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert "differs from the simulator" in document["a"]["failed"]
    assert "differs from the simulator" in document["b"]["failed"]
    assert [row["mismatches"] for row in document["c"]] == [0, 0]
    assert "2 of 3 graphs are wrong: a: onnxruntime" in result.stderr
    assert "; and b" in result.stderr
    for foreign in ("np.float32", "{"):
        assert foreign not in result.stderr


def test_a_source_that_is_not_there_is_said_before_what_else_is_missing():
    result = invoke("calibrate", "nothere", "-o", "plan.json")
    assert result.exit_code == 2
    assert "there is no 'nothere': pass a model folder" in result.stderr


@pytest.mark.parametrize("text", ["word " * 1000, "two\nlines"])
def test_a_text_in_the_place_of_a_path_is_named_as_that(text):
    with pytest.raises(InputError, match=r"data is a text of \d+ characters where a path is expected; pass"):
        list(token_batches(text))


@pytest.mark.parametrize(("rounding", "said"), [("hexagon", "Hexagon"), ("tflite", "TFLite")])
def test_an_unknown_rounding_is_refused_before_the_model_runs(rounding, said, tmp_path, monkeypatch):
    lower = stress_matrices("half_random", 4, 16)
    plan = qinvert.calibrate(lower, method="newton_schulz", target="npu-qdq-int8", min_sqnr_db=0)

    def never():
        raise AssertionError
        yield lower

    with pytest.raises(PlanError, match=said):
        qinvert.simulate(plan, never(), rounding=rounding)
    # And before it is loaded.
    plan.save(tmp_path / "plan.json")
    monkeypatch.setattr("qinvert.cli.sources.load_model", never)
    result = invoke("simulate", tmp_path / "plan.json", "--model", recall.NAME, "--rounding", rounding)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_model_of_16_bits_is_refused_before_it_is_traced(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("onnxscript")
    plan = qinvert.calibrate({"layer": stress_matrices("half_random", 4, 64)})
    monkeypatch.setattr("qinvert.export.whole_models.export_model.trace", None)
    model = recall.load_model().to(torch.bfloat16)
    with pytest.raises(InputError, match=r"is bfloat16, but only float32 models .* pass model.float\(\)"):
        qinvert.export_model(model, plan, torch.zeros(1, 64, dtype=torch.int64), tmp_path / "m.onnx")


@pytest.mark.parametrize("place", ["import click", "from qinvert.calibration.survey import survey", ""])
def test_interrupts_end_with_130_and_no_traceback(place, tmp_path):
    # The process interrupts itself in an import of the verb, or is interrupted while it works.
    raising = INTERRUPTED.format(place=place) if place else ""
    command = [sys.executable, "-c", f"{raising}from qinvert.cli import main\nmain()"]
    command += ["inspect", "--stress", "--chunk", "64"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": ""},
        # Whoever runs the tests in the background ignores interrupts, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    if not place:
        time.sleep(3)
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    command = f"{sys.executable} -m qinvert.cli profiles | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["/bin/bash", "-c", command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.stdout.endswith("0\n")


def test_what_is_replaced_is_said(tmp_path):
    np.savez(tmp_path / "L.npz", layer=stress_matrices("half_random", 4, 16).numpy())
    plan, graphs = tmp_path / "plan.json", tmp_path / "graphs"
    for word in ("wrote", "replaced"):
        result = invoke("calibrate", tmp_path / "L.npz", "-o", plan)
        assert f"{word} {plan}" in result.stdout
        result = invoke("export", plan, "-o", graphs)
        assert f"{word} {graphs / 'layer.onnx'}" in result.stdout


@pytest.fixture
def foreign(tmp_path):
    """A name that is not UTF-8, which files may have on Linux."""
    path = tmp_path / os.fsdecode(b"\xff")
    try:
        path.touch()
    except OSError:
        pytest.skip("this file system takes text only")
    path.unlink()
    return path


def test_names_that_are_no_text_are_written_and_read(foreign, tmp_path):
    np.savez(tmp_path / "L.npz", layer=stress_matrices("half_random", 4, 16).numpy())
    plan = f"{foreign}.json"
    for call in (
        ("calibrate", tmp_path / "L.npz", "-o", plan, "--checkpoint", f"{foreign}.npz"),
        ("simulate", plan, "--json"),
        ("export", plan, "-o", foreign),
        ("verify", foreign),
    ):
        result = invoke(*call)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("verb", [("export-model", "plan.json"), ("graft", "model.onnx", "plan.json")])
def test_names_that_no_model_can_have_are_refused_before_the_work(verb, foreign, monkeypatch):
    monkeypatch.setattr("qinvert.plan.plan.Plan.load", None)
    result = invoke(*verb, "-o", f"{foreign}.onnx")
    assert result.exit_code == 2
    assert "is not UTF-8 text; choose another name" in result.stderr
    assert not list(foreign.parent.iterdir())


@pytest.mark.parametrize("name", NOTICES)
def test_what_the_exporter_misses_is_not_printed(name, caplog):
    logger, notice = logging.getLogger(name), f"{NOTICES[name]}. And more"
    with _without_notices():
        logger.warning(notice)
        logger.warning("something else")
    logger.warning(notice)
    assert [record.getMessage() for record in caplog.records] == ["something else", notice]


def test_a_tokenizer_that_is_not_there_is_said(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=r"there is no such folder, .*; pass a folder with tokenizer.json"):
        find_tokenizer(None, tmp_path / "nothing")


def test_arguments_of_evaluate_in_another_order_are_named():
    plan = qinvert.calibrate(stress_matrices("half_random", 4, 16))
    with pytest.raises(InputError, match=r"the first argument is a Plan; call evaluate\(model, plan, data\)"):
        qinvert.evaluate(plan, recall.load_model, [])


@pytest.mark.parametrize("verb", ["simulate", "evaluate", "calibrate"])
def test_only_the_verb_that_takes_matrices_as_data_offers_them(verb):
    said = CliRunner().invoke(cli, [verb, "--help"]).output
    options = said[said.index("Options:") : said.index("--num-samples")]
    assert "atrices" not in options
    assert ("With matrices L as --data" in said) == (verb == "simulate")
