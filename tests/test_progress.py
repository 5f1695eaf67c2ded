"""Progress: what the library reports, and what a terminal shows of it."""

import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest

import qinvert
from qinvert.progress import listening, track
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


def test_nothing_is_shown_elsewhere(matrices, tmp_path):
    arguments = ["calibrate", str(matrices), "-o", str(tmp_path / "p.json")]
    assert "layers" not in shown(arguments, terminal=False)
    assert "layers" not in shown([*arguments, "--quiet"], terminal=True)
