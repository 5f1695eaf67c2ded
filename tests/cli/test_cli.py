import json
import os
import pathlib

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import qinvert
from qinvert import recall
from qinvert.cli.app import cli
from qinvert.cli.graph_folder import file_names
from qinvert.profiles import PROFILES
from qinvert.stress import stress_matrices

VERBS = (
    "demo",
    "inspect",
    "calibrate",
    "simulate",
    "export",
    "verify",
    "evaluate",
    "export-model",
    "graft",
    "profiles",
)


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def refused(*arguments):
    """Run a call that must end with one line on stderr, nothing on stdout, and exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("qinvert: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture
def matrices(tmp_path):
    path = tmp_path / "l.npz"
    np.savez(path, layer=stress_matrices("correlated_keys", 8, 16).numpy())
    return path


@pytest.fixture
def plan(matrices, tmp_path):
    path = tmp_path / "plan.json"
    assert run("calibrate", matrices, "-o", path).exit_code == 0
    return path


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb):
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert f"Example: qinvert {verb}" in result.stdout
    assert "--json" in result.stdout
    assert "--quiet" in result.stdout


def test_heads_that_need_it_are_planned_by_themselves(tmp_path):
    lower = stress_matrices("correlated_keys", 16, 32).numpy()
    np.savez(tmp_path / "l.npz", a=np.stack([lower, lower / 20]), b=np.stack([lower, lower / 2]))
    shown = run("calibrate", tmp_path / "l.npz", "--granularity", "auto", "-o", tmp_path / "plan.json")
    assert shown.exit_code == 0
    assert "a: grids per head: its worst head gains," in shown.stdout
    assert "b: grids per head" not in shown.stdout
    document = json.loads((tmp_path / "plan.json").read_text())
    assert list(document["layers"]) == ["a/head_0", "a/head_1", "b"]
    # The plan of some heads and some whole layers goes through every other verb of matrices.
    assert run("inspect", tmp_path / "plan.json").exit_code == 0
    assert run("simulate", tmp_path / "plan.json", "--data", tmp_path / "l.npz").exit_code == 0
    assert run("export", tmp_path / "plan.json", "-o", tmp_path / "graphs").exit_code == 0
    verified = run("verify", tmp_path / "graphs", "--data", tmp_path / "l.npz", "--json")
    results = json.loads(verified.stdout)
    assert results.keys() == document["layers"].keys()
    assert {r["mismatches"] for each in results.values() for r in each} == {0}


def test_the_whole_job_on_matrices(matrices, plan, tmp_path):
    shown = json.loads(run("inspect", plan, "--json").stdout)
    assert shown["layers"]["layer"]["accumulator_bound"] < 2**31
    report = json.loads(run("simulate", plan, "--data", matrices, "--json").stdout)
    assert report["layers"]["layer"]["sqnr_db"] > 20
    exported = run("export", plan, "-o", tmp_path / "graphs", "--batch", 4, "--json")
    assert json.loads(exported.stdout)["files"] == {"layer": str(tmp_path / "graphs" / "layer.onnx")}
    assert sorted(os.listdir(tmp_path / "graphs")) == ["layer.onnx", "plan.json"]
    for extra in ((), ("--data", matrices)):
        verified = json.loads(run("verify", tmp_path / "graphs", *extra, "--json").stdout)
        assert [r["mismatches"] for r in verified["layer"]] == [0, 0]


def test_results_are_tables_unless_json_or_quiet(matrices, plan):
    assert "sqnr," in run("simulate", plan).stdout
    assert "powers of M against the inverse" in run("inspect", matrices).stdout
    assert "calibrated" in run("inspect", plan).stdout
    assert run("simulate", plan, "--quiet").output == ""
    assert (
        json.loads(run("inspect", matrices, "--json", "--quiet").stdout)["layers"]["layer"]["matrices"] == 8
    )


def test_profiles_are_listed():
    shown = run("profiles").stdout
    assert all(name in shown for name in PROFILES)
    listed = json.loads(run("profiles", "--json").stdout)
    assert list(listed) == list(PROFILES)
    assert listed["int-ops"]["opset"] == 19
    assert [listed[n]["types"] for n in ("int-ops-x86", "npu-qdq-uint8")] == ["int8, uint8 x int8", "uint8"]
    assert all(row["proved"] and row["caveats"] for row in listed.values())


def test_a_missed_goal_is_exit_code_1(matrices, plan, tmp_path):
    assert run("simulate", plan, "--min-sqnr", 20).exit_code == 0
    result = run("simulate", plan, "--min-sqnr", 80)
    assert result.exit_code == 1
    assert "missed" in result.stdout
    missing = run("calibrate", matrices, "-o", tmp_path / "p.json", "--min-sqnr", 80)
    assert missing.exit_code == 1
    assert "NO" in missing.stdout
    assert (tmp_path / "p.json").is_file()


def test_the_embedded_model_needs_no_data(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "plan.json"
    assert run("calibrate", "recall", "--sequences", 4, "-o", path).exit_code == 0
    tokens = tmp_path / "tokens.npz"
    np.savez(tokens, input_ids=recall.sequences(2).numpy())
    for extra in (("--sequences", 2), ("--data", tokens)):
        result = json.loads(run("evaluate", path, *extra, "--json").stdout)
        assert result["score"] == result["exact_score"] == 1.0
        report = json.loads(run("simulate", path, *extra, "--json").stdout)
        assert {r["matrices"] for r in report["layers"].values()} == {32}
    growth = json.loads(run("inspect", "recall", "--sequences", 2, "--json").stdout)
    assert growth["layers"]["model.layers.1.linear_attn"]["powers"]["8"] > 1e3


def test_plans_are_evaluated_side_by_side(tmp_path):
    pytest.importorskip("transformers")
    paths = [tmp_path / f"int{bits}.json" for bits in (8, 4)]
    for path, bits in zip(paths, (8, 4), strict=True):
        options = ("--bits", bits, "--method", "block_merge", "--sequences", 2)
        assert run("calibrate", "recall", *options, "-o", path, "--min-sqnr", -20).exit_code in (0, 1)
    assert "--compare" in refused("evaluate", *paths)
    assert "Missing argument" in refused("evaluate", "--compare")
    result = run("evaluate", "--compare", *paths, "--sequences", 2)
    assert result.exit_code == 0
    for text in ("Model under each plan", "int8.json", "int4.json", "final", "state", "layers."):
        assert text in result.stdout
    found = json.loads(run("evaluate", "--compare", *paths, "--sequences", 2, "--json").stdout)["plans"]
    assert list(found) == [str(path) for path in paths]
    assert found[str(paths[0])]["kl"] < found[str(paths[1])]["kl"]
    for layer, errors in found[str(paths[0])]["layers"].items():
        assert set(errors) == {"t", "u", "w", "out", "state", "heads"}
        assert errors["out"] > found[str(paths[1])]["layers"][layer]["out"] + 10
    alone = json.loads(run("evaluate", paths[0], "--sequences", 2, "--json").stdout)
    assert alone == found[str(paths[0])]


def test_a_model_folder_takes_token_files(tmp_path):
    pytest.importorskip("transformers")
    folder = tmp_path / "model"
    recall.load_model().save_pretrained(folder)
    np.savez(tmp_path / "tokens.npz", input_ids=recall.sequences(2).numpy())
    path = tmp_path / "plan.json"
    assert run("calibrate", folder, "--data", tmp_path / "tokens.npz", "-o", path).exit_code == 0
    assert "--data FILE" in refused("calibrate", folder, "-o", tmp_path / "other.json")
    assert "--data FILE" in refused("evaluate", path)


BAD_MATRICES = {
    "nan": lambda m: m.__setitem__((0, 5, 1), np.nan),
    "infinite": lambda m: m.__setitem__((0, 5, 1), np.inf),
    "upper": lambda m: m.__setitem__((0, 1, 5), 1.0),
    "diagonal": lambda m: m.__setitem__((0, 5, 5), 1.0),
}


@pytest.mark.parametrize("kind", BAD_MATRICES)
def test_bad_matrices_are_refused_and_leave_no_plan(kind, tmp_path):
    lower = stress_matrices("small_random", 2, 16).numpy()
    BAD_MATRICES[kind](lower)
    np.savez(tmp_path / "bad.npz", a=lower)
    assert "'a'" in refused("calibrate", tmp_path / "bad.npz", "-o", tmp_path / "plan.json")
    assert os.listdir(tmp_path) == ["bad.npz"]


@pytest.mark.parametrize("shape", [(2, 12, 12), (2, 16, 8), (16,), (0, 16, 16)])
def test_bad_sizes_are_refused(shape, tmp_path):
    np.savez(tmp_path / "bad.npz", a=np.zeros(shape, dtype=np.float32))
    refused("calibrate", tmp_path / "bad.npz", "-o", tmp_path / "plan.json")
    assert os.listdir(tmp_path) == ["bad.npz"]


def test_damaged_files_are_refused(matrices, plan, tmp_path):
    matrices.write_bytes(matrices.read_bytes()[:-30])
    assert "cannot read" in refused("calibrate", matrices, "-o", tmp_path / "new.json")
    content = plan.read_text()
    plan.write_text(content[: len(content) // 2])
    assert "truncated" in refused("simulate", plan)
    assert "truncated" in refused("export", plan, "-o", tmp_path / "graphs")
    assert not (tmp_path / "new.json").exists()
    assert not (tmp_path / "graphs").exists()


def test_a_newer_schema_is_refused(plan):
    document = json.loads(plan.read_text())
    document["schema_version"] = 99
    plan.write_text(json.dumps(document))
    assert "upgrade qinvert" in refused("simulate", plan)


def test_a_plan_whose_program_does_not_match_is_refused(plan):
    document = json.loads(plan.read_text())
    del document["layers"]["layer"]["tensors"]["M"]
    plan.write_text(json.dumps(document))
    assert "lacks 'M'" in refused("export", plan, "-o", plan.parent / "graphs")
    assert not (plan.parent / "graphs").exists()


def test_damaged_graphs_are_refused(plan, tmp_path):
    run("export", plan, "-o", tmp_path / "graphs")
    graph = tmp_path / "graphs" / "layer.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])
    assert "not an ONNX model" in refused("verify", tmp_path / "graphs")
    graph.unlink()
    assert "no exported layer" in refused("verify", tmp_path / "graphs")


@pytest.mark.parametrize(
    "arguments",
    [
        ("calibrate", "nowhere.npz", "-o", "p.json"),
        ("calibrate", "nowhere", "--data", "t.npz", "-o", "p.json"),
        ("calibrate", "recall", "--data", "nowhere.npz", "-o", "p.json"),
        ("simulate", "nowhere.json"),
        ("export", "nowhere.json", "-o", "graphs"),
        ("verify", "nowhere"),
        ("evaluate", "nowhere.json"),
        ("inspect", "nowhere"),
    ],
)
def test_missing_files_are_refused(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(*arguments)
    assert os.listdir(tmp_path) == []


def test_illegal_options_are_refused(matrices, plan, tmp_path):
    out = tmp_path / "out"
    assert "unknown layer 'x'" in refused("export", plan, "-o", out, "--layer", "x")
    assert "unknown profile" in refused("export", plan, "-o", out, "--profile", "x")
    assert "batch 0" in refused("export", plan, "-o", out, "--batch", 0)
    assert "unknown method" in refused("calibrate", matrices, "-o", out, "--method", "x")
    assert "takes int8" in refused("calibrate", matrices, "-o", out, "--bits", 4, "--target", "npu-qdq-int8")
    assert "leave out --data" in refused("calibrate", matrices, "--data", matrices, "-o", out)
    assert not out.exists()


def test_unwritable_places_are_refused(matrices, plan, tmp_path):
    assert "cannot write" in refused("calibrate", matrices, "-o", tmp_path / "missing" / "plan.json")
    (tmp_path / "file").write_text("in the way")
    assert "cannot write" in refused("export", plan, "-o", tmp_path / "file" / "graphs")


def test_layer_names_never_leave_the_folder(plan):
    layer = qinvert.Plan.load(plan).layer()
    hostile = ("../../up", "/etc/passwd", "..", "", "a/b", "a_b", "." * 300, "con\x00trol")
    names = file_names(qinvert.Plan(layers=dict.fromkeys(hostile, layer), target="int-ops"))
    assert len(set(names.values())) == len(hostile)
    for name in names.values():
        assert pathlib.PurePath(name).name == name
        assert not name.startswith(".")


def test_a_failed_gate_of_verify_is_an_error_not_a_traceback(plan, tmp_path):
    run("export", plan, "-o", tmp_path / "graphs", "--profile", "int-ops")
    document = json.loads((tmp_path / "graphs" / "plan.json").read_text())
    for tensor in document["layers"]["layer"]["tensors"].values():
        tensor["scale"] = tensor["scale"] * 2
    document["layers"]["layer"]["requantize"] = "divide"
    (tmp_path / "graphs" / "plan.json").write_text(json.dumps(document))
    assert "exported from another plan" in refused("verify", tmp_path / "graphs")
    graph = tmp_path / "graphs" / "layer.onnx"
    model = onnx.load(graph)
    for entry in model.metadata_props:
        if entry.key == "qinvert.plan_sha256":
            entry.value = qinvert.Plan.load(tmp_path / "graphs" / "plan.json").sha256
    onnx.save(model, graph)
    assert "differs from the simulator" in refused("verify", tmp_path / "graphs")


@pytest.mark.parametrize(
    "arguments",
    [
        ("simulate", "p.json", "--min-sqnr", "nan"),
        ("simulate", "p.json", "--min-sqnr", "inf"),
        ("verify", "g", "--min-sqnr", "nan"),
        ("calibrate", "recall", "-o", "p.json", "--min-sqnr", "nan"),
        ("calibrate", "recall", "-o", "p.json", "--seed", "-1"),
        ("inspect", "recall", "--seed", str(2**64)),
        ("simulate",),
        ("simulate", "p.json", "--no-such-option"),
        ("no-such-verb",),
        ("export", "p.json", "-o", "g", "--batch", "many"),
    ],
)
def test_illegal_options_are_one_line(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--help" in refused(*arguments)
    assert os.listdir(tmp_path) == []


def test_no_verb_is_help():
    result = run()
    assert result.exit_code == 2
    assert "qinvert demo" in result.output


def test_verify_is_a_gate_too(matrices, plan, tmp_path):
    run("export", plan, "-o", tmp_path / "g")
    passed = run("verify", tmp_path / "g", "--data", matrices, "--min-sqnr", 20, "--json")
    assert passed.exit_code == 0
    assert 20 < json.loads(passed.stdout)["layer"][0]["sqnr_db"] < 60
    # Without --data: the matrices that the plan was made from.
    assert run("verify", tmp_path / "g", "--min-sqnr", 20).exit_code == 0
    assert run("verify", tmp_path / "g", "--min-sqnr", 80).exit_code == 1
    missed = run("verify", tmp_path / "g", "--data", matrices, "--min-sqnr", 80)
    assert missed.exit_code == 1
    assert "missed" in missed.stdout


def test_matrices_of_two_sizes_are_refused_by_verify(plan, tmp_path):
    run("export", plan, "-o", tmp_path / "g")
    sizes = {"layer": np.zeros((2, 16, 16), np.float32), "other": np.zeros((2, 8, 8), np.float32)}
    np.savez(tmp_path / "mixed.npz", **sizes)
    assert run("verify", tmp_path / "g", "--data", tmp_path / "mixed.npz").exit_code == 0
    np.savez(tmp_path / "small.npz", layer=sizes["other"])
    assert "8 x 8" in refused("verify", tmp_path / "g", "--data", tmp_path / "small.npz")


def test_a_failed_export_leaves_an_old_folder_as_it_was(plan, tmp_path):
    layer = qinvert.Plan.load(plan).layer()
    int4 = qinvert.calibrate(stress_matrices("half_random", 8, 16), bits=4, target="int-ops").layer()
    qinvert.Plan(layers={"a": layer, "b": int4}, target="npu-qdq-int8").save(tmp_path / "two.json")
    folder = tmp_path / "graphs"
    folder.mkdir()
    (folder / "keep.txt").write_text("mine")
    assert "takes int8" in refused("export", tmp_path / "two.json", "-o", folder)
    assert os.listdir(folder) == ["keep.txt"]
    (folder / "plan.json").mkdir()
    assert "cannot write" in refused("export", plan, "-o", folder)
    assert sorted(os.listdir(folder)) == ["keep.txt", "plan.json"]


def test_layers_never_share_a_file(plan):
    layer = qinvert.Plan.load(plan).layer()
    names = file_names(qinvert.Plan(layers=dict.fromkeys(("a_2", "a", ".a", "A", "a_3"), layer), target="x"))
    assert len({name.casefold() for name in names.values()}) == 5


def test_names_with_markup_and_control_codes_are_shown_as_they_are(plan, tmp_path):
    layer = qinvert.Plan.load(plan).layer()
    names = ("[bold]a[/bold]", "[/nothing]", "bell\x07\x1b[31m")
    qinvert.Plan(layers=dict.fromkeys(names, layer), target="int-ops").save(tmp_path / "names.json")
    shown = run("inspect", tmp_path / "names.json")
    assert shown.exit_code == 0
    assert "[bold]a[/bold]" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert "\\x1b[31m" in shown.stdout


def test_tokens_without_reads_are_evaluated_without_an_accuracy(tmp_path):
    pytest.importorskip("transformers")
    run("calibrate", "recall", "--sequences", 2, "-o", tmp_path / "plan.json")
    np.savez(tmp_path / "t.npz", input_ids=np.array([[1, 130] * 64]))
    result = run("evaluate", tmp_path / "plan.json", "--data", tmp_path / "t.npz", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["score"] is None


@pytest.fixture
def two_layers(tmp_path):
    lower = stress_matrices("correlated_keys", 8, 16)
    qinvert.calibrate({"a.0": lower, "a.1": lower / 2}).save(tmp_path / "two.json")
    return tmp_path / "two.json"


@pytest.mark.parametrize("output", ["T", "integers"])
@pytest.mark.parametrize("source", [("L",), ("M",), ("keys", "--key-size", 8)])
def test_one_file_for_all_layers_is_verified_layer_by_layer(two_layers, source, output, tmp_path):
    options = ("--one-file", "--input", *source, "--output-type", output)
    exported = run("export", two_layers, "-o", tmp_path / "g", *options, "--json")
    file = str(tmp_path / "g" / "all_layers.onnx")
    assert json.loads(exported.stdout)["files"] == {"a.0": file, "a.1": file}
    assert sorted(os.listdir(tmp_path / "g")) == ["all_layers.onnx", "plan.json"]
    verified = json.loads(run("verify", tmp_path / "g", "--json").stdout)
    assert list(verified) == ["a.0", "a.1"]
    assert all(r["mismatches"] == 0 for rows in verified.values() for r in rows)


def test_verify_finds_graphs_of_both_kinds(two_layers, tmp_path):
    run("export", two_layers, "-o", tmp_path / "g", "--layer", "a.0")
    run("export", two_layers, "-o", tmp_path / "g", "--one-file")
    found = json.loads(run("verify", tmp_path / "g", "--json").stdout)
    assert list(found) == ["a.0", "a.0 (all_layers.onnx)", "a.1"]


def test_options_of_export_that_do_not_fit_are_refused(two_layers, tmp_path):
    out = tmp_path / "g"
    assert "key_size None" in refused("export", two_layers, "-o", out, "--input", "keys")
    assert "leave it out" in refused("export", two_layers, "-o", out, "--key-size", 8)
    assert "leave out --one-file" in refused(
        "export", two_layers, "-o", out, "--one-file", "--encodings", "ort"
    )
    assert not out.exists()


def test_own_matrices_do_not_fit_a_graph_from_keys(plan, matrices, tmp_path):
    run("export", plan, "-o", tmp_path / "g", "--input", "keys", "--key-size", 8)
    assert "takes keys" in refused("verify", tmp_path / "g", "--data", matrices)
