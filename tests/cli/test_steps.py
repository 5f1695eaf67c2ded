"""The command line with plans of whole chunk steps."""

import json

import pytest
from click.testing import CliRunner

from qinvert.cli.app import cli

pytest.importorskip("transformers")


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


CHUNK = ("calibrate", "recall", "--sequences", 1, "--scope", "chunk")
WIDE = ("--target", "npu-qdq-int16", "--value-bits", 16, "--state-bits", 16)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A plan, and what was printed of it."""
    path = tmp_path_factory.mktemp("steps") / "plan.json"
    result = run(*CHUNK, *WIDE, "-o", path)
    assert result.exit_code == 0, result.output
    return path, result.output


def widest(text):
    """Columns of the widest line of the tables."""
    return max(len(line.rstrip()) for line in text.splitlines() if line.startswith(("┃", "│", "┏")))


def test_calibrate_shows_formats_groups_and_decibels(planned):
    _, text = planned
    assert "int8+int16" in text
    assert "v state v_new o" in text
    assert "cost: int8 multiply-accumulates per matrix" in text
    assert "model.layers.0.linear_attn: passed over: v and state and v_new and o wide, channels " in text
    assert widest(text) <= 100


def test_simulate_shows_output_state_and_t(planned):
    path, _ = planned
    result = run("simulate", path, "--sequences", 1, "--seed", 5)
    assert result.exit_code == 0, result.output
    for column in ("o", "state", "one step", "T", "worst o", "saturated", "tokens"):
        assert f" {column} ┃" in result.output
    assert widest(result.output) <= 100
    document = json.loads(run("simulate", path, "--sequences", 1, "--seed", 5, "--json").output)
    step = document["steps"]["model.layers.1.linear_attn"]
    assert step["tokens"] == 512
    assert step["sqnr_o_db"] > 20
    assert run("simulate", path, "--sequences", 1, "--min-sqnr", 60, "--quiet").exit_code == 1


@pytest.mark.parametrize(
    ("options", "carried", "read"),
    [
        (("--target", "npu-qdq-int16", "--error-feedback"), "int16", "int8"),
        (("--target", "npu-qdq-int8", "--state-bits", "float32"), "float32", "int8"),
    ],
)
def test_a_state_may_be_carried_otherwise_than_it_is_read(options, carried, read, tmp_path):
    path = tmp_path / "plan.json"
    result = run(*CHUNK, *options, "--min-sqnr", 1, "--no-equalize", "--ranges", "max", "-o", path)
    assert result.exit_code == 0, result.output
    assert carried in result.output
    document = json.loads(path.read_text())
    for layer in document["layers"].values():
        tensors = layer["tensors"]
        assert (tensors["state"]["format"], tensors["state/read"]["format"]) == (carried, read)


def test_saturations_are_warned_of(tmp_path):
    """Ranges of the largest value seen are reached by the data that they are from."""
    path = tmp_path / "narrow.json"
    result = run(*CHUNK, "--bits", 8, "--ranges", "mse", "--no-equalize", "--min-sqnr", 0, "-o", path)
    assert result.exit_code == 0, result.output
    assert "channels as they are, ranges by mse" in result.output
    text = run("simulate", path, "--sequences", 1).output
    assert "warning: model.layers.0.linear_attn: values at the ends of their grids: " in text
    assert "--state-margin" in text


def test_evaluate_has_no_columns_of_t(planned):
    path, _ = planned
    text = run("evaluate", path, "--sequences", 1, "--seed", 5).output
    assert "task accuracy" in text
    assert "final" in text
    assert "T ┃" not in text
    assert "beta" not in text
    document = json.loads(run("evaluate", path, "--sequences", 1, "--seed", 5, "--json").output)
    errors = document["layers"]["model.layers.0.linear_attn"]
    assert errors["t"] is errors["u"] is errors["w"] is None
    assert errors["out"] > 20


def test_inspect_says_which_ranges_are_proved(planned):
    path, _ = planned
    text = run("inspect", path).output
    assert " steps, ranges of every group" in text
    assert "proved" in text
    assert "Candidates, cheapest first, o and state in dB" in text
    assert "for any inputs" in text
    assert widest(text) <= 100
    document = json.loads(run("inspect", path, "--json").output)
    layer = document["layers"]["model.layers.0.linear_attn"]
    assert set(layer["margins"]) == {"v", "v_new", "o", "state"}
    assert layer["margins"]["state"] >= 4
    assert "state" in layer["unproved"]
    assert {"k", "q", "g", "beta"} & set(layer["unproved"]) == set()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scope", "layer"), "'layer' is not one of"),
        (("--form", "wy"), "--form goes with --scope chunk; leave it out"),
        (("--value-bits", 8), "--value-bits goes with --scope chunk"),
        (("--no-equalize",), "--no-equalize goes with --scope chunk"),
        (("--rotate",), "--rotate goes with --scope chunk"),
        (("--scope", "chunk", "--form", "uw"), "'uw' is not one of"),
        (("--scope", "chunk", "--value-bits", 12), "'12' is not one of"),
        (("--scope", "chunk", "--state-margin", 0.5), "state_margin 0.5 is below 1"),
        (("--scope", "chunk", "--factored"), "factored goes with scope='inverse'"),
        (("--scope", "chunk", "--value-bits", 16), "no format of more than 8 bits for values"),
        (("--int4", "T"), "--int4 goes with --scope chunk"),
        (
            ("--scope", "chunk", "--int4", "T"),
            "does not take 4 and 8 bits side by side; choose one of int-ops",
        ),
        (("--scope", "chunk", "--target", "int-ops", "--int4", "Z"), "int4 names 'Z', which is no tensor"),
        (("--error-feedback",), "--error-feedback goes with --scope chunk"),
        (("--scope", "chunk", "--error-feedback"), "no format of more than 8 bits for values or a state"),
        (
            ("--scope", "chunk", "--error-feedback", "--state-bits", "float32"),
            "a state in float32 loses nothing that could be fed back",
        ),
        (("--scope", "chunk", "--value-bits", "float32"), "'float32' is not one of"),
        (("--scope", "chunk", "--max-loss", 1), "max_loss_db goes with scope='inverse'"),
    ],
)
def test_options_that_do_not_fit_are_one_line_and_exit_code_2(options, words, tmp_path):
    result = run("calibrate", "recall", "--sequences", 1, "-o", tmp_path / "p.json", *options)
    assert result.exit_code == 2
    assert words in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "p.json").exists()


def test_a_missed_goal_is_exit_code_1_and_says_what_would_help(tmp_path):
    result = run(*CHUNK, "--bits", 8, "--min-sqnr", 60, "-o", tmp_path / "p.json")
    assert result.exit_code == 1
    assert "misses its goal: pass bits='auto' with a target of 16 bits" in result.output
    assert (tmp_path / "p.json").exists()
