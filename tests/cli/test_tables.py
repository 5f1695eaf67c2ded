"""Tables at the widths of terminals: no number is broken, no column is lost, no line is too long."""

import ast
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qinvert import cli
from qinvert.cli.app import cli as app
from qinvert.cli.output import FILE_WIDTH
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


def test_numbers_stand_on_the_right_and_words_on_the_left():
    table = Table(title="t", columns=("a", "b", "c"), rows=(("x", "1.5", "words"), ("y", "-", "2 words")))
    assert [table.of_numbers(i) for i in (1, 2)] == [True, False]
    last = drawn(table, 80).splitlines()[-2]
    assert last == "│ y │   - │ 2 words │"
    # Where there is room, a heading takes one line.
    wide = Table(title="t", columns=("a", "max|T - I|"), rows=(("x", "1"),))
    assert "max|T - I|" in drawn(wide, 80)
    assert "max|T - I|" not in drawn(wide, 12)


def test_headings_and_lines_wrap_between_words():
    assert (
        len(wrapped("values equal to the simulator, dB", heading_width("values equal to the simulator, dB")))
        <= 3
    )
    text = paragraph("  model.layers.1: its powers outgrow the inverse 9.8 times " * 3, 60)
    assert max(map(len, text.splitlines())) <= 60
    assert all(line.startswith("    ") for line in text.splitlines()[1:])
    assert paragraph("short", 80) == "short"


#: What runs in the terminal before the verbs: every table is also written down, with where it is made.
RECORDER = """
import functools, json, pathlib, sys
import torch

torch.set_num_threads(1)
from qinvert.cli import demo, output
import qinvert.calibration.survey as module

# All stress sets and the demo's data take long; with less of them the tables have the same columns.
module.survey = functools.partial(module.survey, sets=("beta_ones",), count=2, bits=(8,))
demo.SEQUENCES = demo.ANSWERED = 2
shown = output.Output.table


def table(self, title, columns, rows):
    caller = sys._getframe(1).f_code
    site = [pathlib.Path(caller.co_filename).stem, caller.co_name]
    with open("tables.jsonl", "a") as file:
        file.write(json.dumps([site, title, list(columns), [list(row) for row in rows]]) + chr(10))
    shown(self, title, columns, rows)


output.Output.table = table


def cost():
    from qinvert.cli.cost import show_costs
    from qinvert.export.runtimes import CycleEstimate

    # Where no toolkit is installed, nobody estimates.
    traffic = {"read from DDR": 1234567890, "written to DDR": 987654321, "spilled": 12345678}
    found = CycleEstimate(hardware="hexagon-v81", cycles=1234567, lower=1000000, upper=1500000,
                          traffic=traffic, uncosted=3, source="Estimated by a compiler, not measured")
    layers = {f"model.layers.{i}.linear_attn": [found] for i in (0, 10)}
    missing = {"ethos-u85-256": "pip install ethos-u-vela"}
    show_costs(output.Output(as_json=False, quiet=False), layers, missing)
    from qinvert.cli.deployed_folder import show_compiled
    from qinvert.export.deployment.compile_deployment import CompiledGraph

    graphs = [CompiledGraph(file="prefill.onnx", hardware="hexagon-v81", tokens=64, estimate=found)]
    show_compiled(output.Output(as_json=False, quiet=False), graphs)


from qinvert.cli.app import cli

for line in sys.argv[1:]:
    cost() if line == "cost" else cli.main(line.split(), standalone_mode=False)
"""


def in_a_terminal(arguments, folder, width):
    """What verbs write into a terminal of that width, without its colours."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", RECORDER, *arguments], stdout=side, stderr=subprocess.PIPE, cwd=folder,
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
    text = ANSI.sub("", b"".join(parts).decode().replace("\r", ""))
    assert process.returncode == 0, text[-2000:] + errors.decode()
    return text


VERBS = [
    "inspect L.npz",
    "calibrate L.npz -o plan.json --bits 8",
    "inspect plan.json",
    "simulate plan.json --data L.npz",
    "export plan.json -o graphs",
    "verify graphs --data L.npz",
    "report plan.json",
    "doctor graphs/model.layers.0.linear_attn.onnx --hardware ethos-u55-128 --hardware hexagon-v81",
    "profiles",
    "inspect --stress --chunk 8",
    "cost",
]
RECALL = [
    "calibrate recall --sequences 1 --method block_merge --bits 8 -o model.json",
    "evaluate model.json --sequences 1",
    "evaluate model.json --compare model.json --sequences 1",
    "demo",
    "calibrate recall --sequences 1 --scope chunk --bits 8 --min-sqnr 10 -o step.json",
    "inspect step.json",
    "simulate step.json --sequences 1",
    "deploy recall --plan step.json -o deployed",
    "verify deployed",
    "run deployed --tokens 3,14,6 --max-new-tokens 2",
]
WIDTH = WIDTHS[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables")
    names = [f"model.layers.{i}.linear_attn" for i in (0, 10)]
    np.savez(path / "L.npz", **{n: stress_matrices("half_random", 4, 16, i) for i, n in enumerate(names)})
    return path


@pytest.fixture(scope="module")
def shown(folder):
    """What all verbs write at 80 columns."""
    pytest.importorskip("transformers")
    return in_a_terminal([*VERBS, *RECALL], folder, WIDTH)


@pytest.fixture(scope="module")
def tables(folder, shown):
    """Every table that these verbs made: where, title, columns and rows."""
    return [json.loads(line) for line in (folder / "tables.jsonl").read_text().splitlines()]


def check_shown(text, width):
    """No line is longer than the terminal, and no cell ends within a number that goes on below."""
    lines = text.splitlines()
    assert max(map(len, lines)) <= width, max(lines, key=len)
    for upper, lower in pairwise(lines):
        # Only a row without a name goes on with what stands above it.
        if upper.startswith("│") and re.match(r"│ +│", lower):
            for above, below in zip(upper.split("│")[2:-1], lower.split("│")[2:-1], strict=True):
                assert not (re.search(r"^ ?\S*[\d.e-] *$", above) and re.match(r" *[-\d.]*\d *$", below)), (
                    upper
                )


def test_the_check_finds_a_broken_number():
    for broken in ("│ a │ 1.36e- │\n│   │     05 │", "│ a │ 1.36e- │\n│   │ 05     │"):
        with pytest.raises(AssertionError):
            check_shown(broken, 80)
    with pytest.raises(AssertionError):
        check_shown("x" * 81, 80)


def test_every_table_fits_a_terminal(shown):
    check_shown(shown, WIDTH)


def makers():
    """Every function of the command line that prints a table: its module and its name."""
    found = set()
    for file in Path(cli.__file__).parent.glob("*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef):
                calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
                if any(isinstance(call, ast.Attribute) and call.attr == "table" for call in calls):
                    found.add((file.stem, function.name))
    return found


def test_every_place_that_makes_a_table_was_looked_at(tables):
    # A verb with a new table joins the lists above.
    assert len(makers()) > 15
    assert {tuple(site) for site, *_ in tables} == makers()


@pytest.mark.parametrize("width", [*WIDTHS, FILE_WIDTH])
def test_every_table_is_whole_at_every_width(tables, width):
    for _, title, columns, rows in tables:
        table = Table(title=title, columns=tuple(columns), rows=tuple(map(tuple, rows)))
        text = drawn(table, width)
        check_shown(text, width)
        # Single words never wrap but where they are names.
        words = {cell for row in rows for cell in row[1:] if cell and " " not in cell}
        assert words <= set(cells(text)), title


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_wider_terminals_are_not_exceeded(folder, width):
    check_shown(in_a_terminal(["inspect L.npz", "profiles"], folder, width), width)


def test_tables_in_a_file_have_a_width_of_their_own(folder):
    result = CliRunner().invoke(app, ["inspect", str(folder / "L.npz")])
    lines = result.stdout.splitlines()
    check_shown(result.stdout, FILE_WIDTH)
    # Seven powers stand side by side, which 80 columns do not hold.
    assert WIDTHS[0] < max(map(len, lines))
