"""Progress: what the library reports, and what a terminal shows of it."""

import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import qinvert
from qinvert import recall
from qinvert.calibration.data.token_batches import token_batches
from qinvert.calibration.data.token_data import TokenData
from qinvert.calibration.output_goals import ROUNDS
from qinvert.cli.graph_folder import export_all
from qinvert.progress import listening, track
from qinvert.report_page.report import SECTIONS
from qinvert.stress import stress_matrices

LOWER = {name: stress_matrices("correlated_keys", 4, 8) for name in ("a", "b")}


def test_every_item_is_reported_and_nobody_needs_to_listen():
    heard = []
    with listening(lambda *step: heard.append(step)):
        assert list(track("xy", "letters", 2)) == ["x", "y"]
    assert list(track("z", "letters", 1)) == ["z"]
    assert heard == [("letters", 0, 2), ("letters", 1, 2), ("letters", 2, 2)]


def test_calibration_and_verification_say_how_much_there_is(tmp_path):
    last = {}
    with listening(lambda what, done, total: last.update({what: (done, total)})):
        plan = qinvert.calibrate(LOWER, bits=8)
        qinvert.export(plan, tmp_path / "t.onnx", layer="a", batch=4)
        qinvert.verify(tmp_path / "t.onnx", plan, LOWER["a"])
    assert last["layers"] == (2, 2)
    assert last["runtimes"] == (1, 1)
    done, total = last["candidates"]
    assert done == total > 1


def heard(work):
    """The last step of everything that is counted while ``work`` runs."""
    last = {}
    with listening(lambda what, done, total: last.update({what: (done, total)})):
        work()
    return last


def test_goals_of_outputs_count_layers_and_rounds():
    pytest.importorskip("transformers")
    model, tokens = recall.load_model(), recall.sequences(1)
    options = {"method": "block_merge", "bits": 8, "min_output_sqnr_db": 10.0}
    last = heard(lambda: qinvert.calibrate(model, tokens, **options))
    assert last["layers"] == (2, 2)
    # The goal is reached before the last round.
    assert last["rounds at most"] == (0, ROUNDS)


def test_plans_of_steps_count_layers():
    pytest.importorskip("transformers")
    model, tokens = recall.load_model(), recall.sequences(1)
    last = heard(lambda: qinvert.calibrate(model, tokens, scope="chunk", bits=8, min_sqnr_db=0))
    assert last["layers"] == (2, 2)


def test_lists_of_batches_have_a_total_and_streams_have_none():
    batches = [torch.zeros(1, 8, dtype=torch.int64)] * 3
    assert heard(lambda: list(token_batches(batches)))["batches"] == (3, 3)
    assert "batches" not in heard(lambda: list(token_batches(iter(batches))))
    limited = TokenData(data=batches, num_samples=2)
    assert "batches" not in heard(lambda: list(token_batches(limited)))


def test_a_page_counts_its_sections():
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    plan = qinvert.calibrate(LOWER, bits=8)
    last = heard(lambda: qinvert.report(plan, LOWER))
    assert last["sections"] == (len(SECTIONS), len(SECTIONS))
    assert last["layers in detail"] == (2, 2)


def shown(arguments, terminal):
    """What a verb writes to stderr."""
    main, side = pty.openpty() if terminal else os.pipe()  # Where it reads, and where it writes.
    environment = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "qinvert.cli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=side,
        env=environment,
    )
    os.close(side)
    found = b""
    try:
        while part := os.read(main, 65536):
            found += part
    except OSError:
        pass  # A terminal ends like this.
    os.close(main)
    assert process.wait() == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", found.decode())


@pytest.fixture(scope="module")
def matrices(tmp_path_factory):
    path = tmp_path_factory.mktemp("progress") / "L.npz"
    np.savez(path, **{name: lower.numpy() for name, lower in LOWER.items()})
    return path


def test_a_terminal_shows_totals_and_remaining_time(matrices, tmp_path):
    text = shown(["calibrate", str(matrices), "-o", str(tmp_path / "p.json")], terminal=True)
    assert re.search(r"layers\s+\S+\s+[012]/2 \d:\d\d:\d\d (-|\d):(-|\d)", text)
    assert max(map(len, re.split(r"[\r\n]+", text))) <= 80


def test_verifying_a_folder_counts_its_graphs(tmp_path):
    plan = qinvert.calibrate(LOWER, bits=8)
    export_all(plan, tmp_path)
    assert re.search(r"graphs\s+\S+\s+[012]/2 ", shown(["verify", str(tmp_path)], terminal=True))


def test_nothing_is_shown_elsewhere(matrices, tmp_path):
    arguments = ["calibrate", str(matrices), "-o", str(tmp_path / "p.json")]
    assert "layers" not in shown(arguments, terminal=False)
    assert "layers" not in shown([*arguments, "--quiet"], terminal=True)
