"""Tables at the widths of terminals: no number is broken, no column is lost, no line is too long."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qinvert.cli.tables import Table, common_prefix, drawings, heading_width, paragraph, wrapped
from qinvert.stress import stress_matrices

WIDTHS = (80, 100, 120)
NUMBER = re.compile(r"[-+]?\d[\d.,e+-]*")
ANSI = re.compile(r"\x1b\[[\d;?]*[a-zA-Z]")


def drawn(table, width):
    console = Console(width=width, file=io.StringIO(), record=True)
    for drawing in drawings(table, width):
        console.print(drawing)
    return console.export_text()


def cells(text):
    """Every cell that one line of a drawing holds."""
    return [cell.strip() for line in text.splitlines() if line.startswith("│") for cell in line.split("│")]


numbers = st.floats(allow_nan=False, allow_infinity=False).map("{:.2e}".format) | st.integers(0, 10**9).map(
    str
)


@given(
    st.lists(st.lists(numbers, min_size=9, max_size=9), min_size=1, max_size=3),
    st.sampled_from(WIDTHS),
)
def test_numbers_stay_whole_and_every_column_is_shown(values, width):
    rows = tuple((f"model.layers.{i}.linear_attn", *row) for i, row in enumerate(values))
    columns = ("layer", *(f"largest error number {i}, dB" for i in range(9)))
    text = drawn(Table(title="Errors", columns=columns, rows=rows), width)
    assert max(map(len, text.splitlines())) <= width
    assert set(cells(text)) >= {cell for row in values for cell in row}


def test_a_number_that_does_not_fit_would_be_seen():
    # The check of the test above fails where numbers are folded.
    console = Console(width=20, file=io.StringIO(), record=True)
    table = Table(title="", columns=("layer", "error"), rows=(("a" * 9, "1.234567890e-05"),))
    console.print(next(drawings(table, 80)), width=20)
    assert "1.234567890e-05" not in cells(console.export_text())


def test_names_of_layers_give_their_beginning_to_the_title():
    names = [f"model.layers.{i}.linear_attn" for i in (1, 10)]
    short = Table(title="Plan", columns=("layer", "sqnr"), rows=tuple((n, "1") for n in names)).shortened()
    assert short.title == "Plan; each layer is model.layers.*"
    assert [row[0] for row in short.rows] == ["1.linear_attn", "10.linear_attn"]
    assert common_prefix(["model.layers.1"]) == common_prefix(["a", "ab"]) == common_prefix([]) == ""


def test_columns_that_do_not_fit_stand_in_a_block_of_their_own():
    table = Table(title="t", columns=("layer", "a", "b"), rows=(("x", "1" * 30, "2" * 30),))
    assert [block.columns for block in table.blocks(60)] == [(0, 1), (0, 2)]
    assert [block.columns for block in table.blocks(90)] == [(0, 1, 2)]


def test_headings_and_lines_wrap_between_words():
    assert (
        len(wrapped("values equal to the simulator, dB", heading_width("values equal to the simulator, dB")))
        <= 3
    )
    text = paragraph("  model.layers.1: its powers outgrow the inverse 9.8 times " * 3, 60)
    assert max(map(len, text.splitlines())) <= 60
    assert all(line.startswith("    ") for line in text.splitlines()[1:])
    assert paragraph("short", 80) == "short"


def in_a_terminal(arguments, folder, width):
    """What a verb writes into a terminal of that width, without its colours."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from qinvert.cli.app import cli\n"
        # The survey of all stress sets takes minutes, and its table has the same columns with one set.
        "import functools, qinvert.calibration.survey as module\n"
        "module.survey = functools.partial(module.survey, sets=('beta_ones',), count=2, bits=(8,))\n"
        "for line in sys.argv[1:]:\n"
        "    cli.main(line.split(), standalone_mode=False)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=side, stderr=subprocess.PIPE, cwd=folder,
        env=environment,
    )  # fmt: skip
    os.close(side)
    parts = []
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # Linux says so where the other side was closed.
            break
        if not part:
            break
        parts.append(part)
    os.close(main)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    return ANSI.sub("", b"".join(parts).decode().replace("\r", ""))


VERBS = [
    "inspect L.npz",
    "calibrate L.npz -o plan.json --bits 8",
    "inspect plan.json",
    "simulate plan.json --data L.npz",
    "export plan.json -o graphs",
    "verify graphs --data L.npz",
    "profiles",
    "inspect --stress --chunk 8",
]
RECALL = [
    "calibrate recall --sequences 1 --method block_merge --bits 8 -o model.json",
    "evaluate model.json --sequences 1",
    "evaluate model.json --compare model.json --sequences 1",
]


@pytest.fixture
def folder(tmp_path):
    names = [f"model.layers.{i}.linear_attn" for i in (0, 10)]
    np.savez(tmp_path / "L.npz", **{n: stress_matrices("half_random", 4, 16, i) for i, n in enumerate(names)})
    return tmp_path


def check_shown(text, width):
    """No line is longer than the terminal, and no cell ends within a number that goes on below."""
    lines = text.splitlines()
    assert max(map(len, lines)) <= width, max(lines, key=len)
    for upper, lower in pairwise(lines):
        # Only a row without a name goes on with what stands above it.
        if upper.startswith("│") and re.match(r"│ +│", lower):
            for above, below in zip(upper.split("│")[2:-1], lower.split("│")[2:-1], strict=True):
                assert not (re.search(r"^ ?\S*[\d.e-] $", above) and re.match(r" *[-\d.]*\d *$", below)), (
                    upper
                )


def test_the_check_finds_a_broken_number():
    broken = "│ a │ 1.36e- │\n│   │     05 │"
    with pytest.raises(AssertionError):
        check_shown(broken, 80)
    with pytest.raises(AssertionError):
        check_shown("x" * 81, 80)


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_wider_terminals_are_not_exceeded(folder, width):
    check_shown(in_a_terminal(["inspect L.npz", "profiles"], folder, width), width)


def test_every_table_fits_a_terminal(folder):
    width = WIDTHS[0]
    text = in_a_terminal(VERBS, folder, width)
    for title in (
        "Range growth",
        "Plan",
        "Candidates",
        "Simulated",
        "Verification",
        "Profiles",
        "Runtimes",
        "sqnr of T",
    ):
        assert title in text
    check_shown(text, width)


def test_every_table_of_a_model_fits_a_terminal(folder):
    pytest.importorskip("transformers")
    text = in_a_terminal(RECALL, folder, 80)
    for title in (
        "Model under the plan",
        "Model under each plan",
        "Error inside each layer",
    ):
        assert title in text
    check_shown(text, 80)
