"""Cycles that compilers predict: what a program reports, how it arrives, and what is refused."""

import json
import runpy
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from click.testing import CliRunner
from counting_runtimes import counting_runtime, kept_files

import qinvert
from qinvert.cli.app import cli
from qinvert.errors import ExportError
from qinvert.export import runtimes
from qinvert.export.runtimes import (
    RUNTIMES,
    CycleEstimate,
    Runtime,
    estimate,
    estimates,
    estimators,
    subprocesses,
)
from qinvert.export.runtimes.onnxruntime_cpu import RUNTIME as CPU
from qinvert.export.runtimes.runtime import Execution
from qinvert.stress import stress_matrices

#: A profile as onnxruntime-qnn 2.7.0 writes it, without the times of its stages.
PROFILE = """\
Msg Timestamp,Message,Time,Unit of Measurement,Timing Source,Event Level,Event Identifier
0,FINALIZE,93510,US,BACKEND,ROOT,QNN (finalize) time
0,BACKEND,0,US,BACKEND,ROOT,Performance Estimates
0,BACKEND,26674,CYCLES,BACKEND,SUB-EVENT,Simulated (Accelerator exec cycles)
0,BACKEND,24173,CYCLES,BACKEND,SUB-EVENT,Simulated (Accelerator exec cycles (lower estimate))
0,BACKEND,30038,CYCLES,BACKEND,SUB-EVENT,Simulated (Accelerator exec cycles (upper estimate))
0,BACKEND,15,US,BACKEND,SUB-EVENT,Simulated (Accelerator exec time us)
0,BACKEND,53248,BYTES,BACKEND,SUB-EVENT,Input Fill
0,BACKEND,0,BYTES,BACKEND,SUB-EVENT,Intermediate Fill
0,BACKEND,0,BYTES,BACKEND,SUB-EVENT,Intermediate Spill
0,BACKEND,32768,BYTES,BACKEND,SUB-EVENT,Output Spill
0,BACKEND,0,US,BACKEND,SUB-EVENT,Missing Ops (Number of Ops with no Costs associated)
"""


@pytest.fixture
def program(monkeypatch):
    """Return the functions of the program for QNN; reading a profile calls no toolkit."""
    protocol = ModuleType("protocol")
    vars(protocol).update(runpy.run_path(subprocesses.PROGRAMS / "protocol.py"))
    monkeypatch.setitem(sys.modules, "protocol", protocol)
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", ModuleType("onnxruntime_qnn"))
    monkeypatch.setattr(metadata, "version", lambda name: {"onnxruntime-qnn": "2.7.0"}[name])
    return SimpleNamespace(**runpy.run_path(subprocesses.PROGRAMS / "qnn_program.py"))


def test_a_profile_of_qualcomms_compiler_is_an_estimate(program, tmp_path):
    (tmp_path / "profile.csv").write_text(PROFILE)
    found = CycleEstimate(hardware="hexagon-v81", **program.cost(tmp_path / "profile.csv", "81"))
    assert (found.lower, found.cycles, found.upper) == (24173, 26674, 30038)
    assert (found.traffic["Input Fill"], found.traffic["Output Spill"]) == (53248, 32768)
    assert set(found.traffic) == {"Input Fill", "Intermediate Fill", "Intermediate Spill", "Output Spill"}
    assert found.uncosted == 0
    assert found.source == (
        "simulated by Qualcomm's compiler for SA8797 (Hexagon v81), onnxruntime-qnn 2.7.0, "
        "optimization mode 3; not measured"
    )
    assert found.span == "26,674 (24,173 to 30,038)"


def test_operators_without_a_cost_are_counted(program, tmp_path):
    missing = PROFILE.replace(
        "BACKEND,0,US,BACKEND,SUB-EVENT,Missing", "BACKEND,3,US,BACKEND,SUB-EVENT,Missing"
    )
    (tmp_path / "profile.csv").write_text(missing)
    assert program.cost(tmp_path / "profile.csv", "73")["uncosted"] == 3


@pytest.mark.parametrize("times", [0, 2])
def test_a_graph_in_no_part_or_in_several_has_no_estimate(times, program, tmp_path):
    head, *events = PROFILE.splitlines(keepends=True)
    (tmp_path / "profile.csv").write_text(head + "".join(events * times))
    with pytest.raises(RuntimeError, match=f"estimated cycles {times} times"):
        program.cost(tmp_path / "profile.csv", "81")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"cycles": 0}, "0 cycles"),
        ({"uncosted": -1}, "-1 operators"),
        ({"source": ""}, "say who it is"),
        ({"lower": 101}, "100 cycles are outside 101 to None"),
        ({"upper": 99}, "100 cycles are outside None to 99"),
    ],
)
def test_an_estimate_that_cannot_be_is_refused(changed, said):
    given = {"hardware": "chip", "cycles": 100, "source": "a toy"}
    assert CycleEstimate(**given).span == "100"
    with pytest.raises(ExportError, match=said):
        CycleEstimate(**given | changed)


PROGRAM = """
import json
from protocol import main, request

def run(model, feeds, folder):
    asked, keep = request(folder)
    for chip in asked:
        (folder / f"{chip}.bin").write_bytes(model.read_bytes()[::-1])
        cost = {"hardware": chip, "cycles": 100, "uncosted": UNCOSTED, "source": "toy; not measured"}
        kept = [f"{chip}.bin"] if keep else []
        yield chip, [], {"p": "int8 x int8"}, ["q"], {"estimate": cost, "kept": kept}
    if feeds:
        yield "all", [feed["L"] for feed in feeds], {}, []

main(run)
"""


@pytest.fixture
def abacus(tmp_path, monkeypatch):
    """Return a function that adds a runtime in a process of its own, with two chips."""
    source = Path(subprocesses.__file__).parent / "programs" / "protocol.py"
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "protocol.py").write_text(source.read_text())
    monkeypatch.setattr(subprocesses, "PROGRAMS", programs)

    def add(module="json", uncosted=0, text=PROGRAM, name="abacus"):
        (programs / f"{name}_program.py").write_text(text.replace("UNCOSTED", str(uncosted)))
        made = subprocesses.separate(
            name, "a fake", module, "abacus-kit", hardware={"wood": "Wood", "bone": "Bone"}, loading="by hand"
        )
        monkeypatch.setitem(RUNTIMES, name, made)

    return add


def test_a_program_compiles_estimates_and_keeps_without_any_input(abacus, tmp_path):
    abacus()
    found = estimate(b"graph", "bone", keep=tmp_path / "kept" / "deep")
    assert (found.hardware, found.cycles, found.products, found.elsewhere) == (
        "bone", 100, {"p": "int8 x int8"}, ("q",),
    )  # fmt: skip
    file = tmp_path / "kept" / "deep" / "bone.bin"
    assert found.kept == {str(file): "by hand"}
    assert file.read_bytes() == b"hparg"
    assert estimate(b"graph", "wood").kept == {}


#: A program that refuses one graph, and is ended by another one; each cost is the count of graphs before.
MOODY = """
import os
from protocol import main, request

COUNT = []

def run(model, feeds, folder):
    text = model.read_bytes()
    if text == b"crash":
        os._exit(3)
    if text == b"refuse":
        raise SystemExit("not this one")
    COUNT.append(0)
    for chip in request(folder)[0]:
        cost = {"hardware": chip, "cycles": len(COUNT), "uncosted": text == b"bare", "source": "toy"}
        yield chip, [], {}, [], {"estimate": cost}

main(run)
"""


def test_one_process_compiles_several_graphs_and_outlives_a_refusal(abacus):
    abacus(text=MOODY)
    given = [b"a", b"refuse", b"bare", b"b", b"crash", b"c", b"crash"]
    found = list(estimates(given, "wood"))
    assert [getattr(each, "cycles", None) for each in found] == [1, None, None, 3, None, 1, None]
    said = ("not this one", "have no cost there", "exit code 3", "exit code 3")
    for error, words in zip([each for each in found if isinstance(each, ExportError)], said, strict=True):
        assert words in str(error)


def test_several_graphs_need_the_toolkit_as_one_does(abacus, counting):
    abacus(module="no_such_toolkit")
    with pytest.raises(ExportError, match="pip install abacus-kit"):
        list(estimates([b"graph"], "wood"))
    # A runtime that compiles one at a time answers as well.
    assert [each.cycles for each in estimates([b"graph", b"other graph"], "chip")] == [5, 11]


def test_operators_without_a_cost_are_refused(abacus):
    abacus(uncosted=3)
    with pytest.raises(ExportError, match="toy; not measured: 3 operators of this graph have no cost"):
        estimate(b"graph", "wood")


def test_an_unknown_chip_lists_the_legal_ones(abacus):
    abacus()
    with pytest.raises(ExportError, match=r"unknown hardware 'abakus'; use one of .*hexagon-v81.*wood, bone"):
        estimate(b"graph", "abakus")


def test_a_toolkit_that_is_not_installed_is_named(abacus):
    abacus(module="no_such_toolkit")
    with pytest.raises(ExportError, match=r"pip install abacus-kit, or set QINVERT_ABACUS_PYTHON"):
        estimate(b"graph", "wood")


def test_a_program_that_estimates_nothing_is_refused(abacus):
    abacus(text=PROGRAM.replace("for chip in asked", "for chip in []"))
    with pytest.raises(ExportError, match="abacus gave no estimate for wood"):
        estimate(b"graph", "wood")


def test_two_runtimes_of_one_chip_are_refused(abacus):
    abacus()
    abacus(name="beads")
    with pytest.raises(ExportError, match="runtimes abacus and beads both estimate wood"):
        estimators()


def test_a_runtime_with_chips_must_compile():
    with pytest.raises(ExportError, match="'bare' estimates or keeps files, but has no compile"):
        Runtime(name="bare", execute=CPU.execute, summary="", module="", requirement="", hardware={"a": "b"})


def test_a_runtime_without_files_cannot_keep_any(abacus, tmp_path):
    abacus()
    with pytest.raises(ExportError, match=r"onnxruntime makes no file to keep; these do: .*abacus"):
        runtimes.execute("onnxruntime", b"", [], keep=tmp_path)
    assert list(tmp_path.glob("*.bin")) == []


@pytest.fixture
def graphs(tmp_path):
    """A folder of two graphs, one of which has a name that is no file's."""
    lower = stress_matrices("correlated_keys", 4, 8)
    plan = qinvert.calibrate({"layers/0": lower, "b": lower}, target="npu-qdq-int8", bits=8)
    plan.save(tmp_path / "plan.json")
    folder = tmp_path / "graphs"
    done = CliRunner().invoke(cli, ["export", str(tmp_path / "plan.json"), "-o", str(folder), "--batch", "2"])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def counting(monkeypatch):
    """A runtime that computes as onnxruntime does, and says that a graph costs its bytes."""

    def compiles(content, feeds, request):
        kept = kept_files(content, request)
        for chip in request.hardware:
            cost = CycleEstimate(
                hardware=chip, cycles=len(content), traffic={"Fill": 7}, source="counted", kept=kept
            )
            yield Execution(setting=chip, outputs=[], estimate=cost, kept=kept)
        for execution in CPU.execute(content, feeds) if feeds else ():
            yield Execution(setting="host", outputs=execution.outputs, kept=kept)

    monkeypatch.setitem(RUNTIMES, "counting", counting_runtime(CPU.execute, compiles))


def verify(*arguments):
    return CliRunner().invoke(cli, ["verify", *map(str, arguments)])


def test_verify_shows_cycles_and_keeps_a_folder_for_each_layer(graphs, counting, tmp_path):
    shown = verify(graphs, "--runtime", "counting", "--cost", "--keep", tmp_path / "kept")
    assert shown.exit_code == 0, shown.output
    assert "cycles: counted" in shown.stdout
    assert "Fill 7" in shown.stdout
    kept = sorted(
        path.relative_to(tmp_path / "kept").as_posix() for path in (tmp_path / "kept").rglob("*.bin")
    )
    assert kept == ["b/chip.bin", "layers_0/chip.bin"]
    assert shown.stdout.count("with a loader") == 1
    document = json.loads(verify(graphs, "--runtime", "counting", "--hardware", "chip", "--json").stdout)
    assert set(document) == {"verified", "cost", "not_installed"}
    for label, file in (("layers/0", "layers_0.onnx"), ("b", "b.onnx")):
        (found,) = document["cost"][label]
        size = (graphs / file).stat().st_size
        assert (found["cycles"], found["source"], found["traffic"]) == (size, "counted", {"Fill": 7})
        assert document["verified"][label][0]["mismatches"] == 0


def test_python_gives_the_same(graphs, counting, tmp_path):
    found = qinvert.estimate(graphs / "b.onnx", "chip", keep=tmp_path / "kept")
    assert found.cycles == (graphs / "b.onnx").stat().st_size
    assert list(found.kept.values()) == ["with a loader"]
    plan, lower = qinvert.Plan.load(graphs / "plan.json"), stress_matrices("correlated_keys", 4, 8)
    names = ("onnxruntime", "counting")
    first, *_, last = qinvert.verify(graphs / "b.onnx", plan, lower, runtimes=names, keep=tmp_path / "other")
    assert (first.kept, last.kept) == ({}, {str(tmp_path / "other" / "chip.bin"): "with a loader"})


def test_without_the_toolkit_all_else_works_and_one_line_says_so(graphs, abacus):
    abacus(module="no_such_toolkit")
    shown = verify(graphs, "--hardware", "wood")
    assert shown.exit_code == 0, shown.output
    assert "onnxruntime (optimized)" in shown.stdout
    (line,) = [line for line in shown.stdout.splitlines() if "wood" in line]
    assert line.startswith(
        "cycles of wood are left out: abacus is not installed; run: pip install abacus-kit"
    )
    document = json.loads(verify(graphs, "--hardware", "wood", "--json").stdout)
    assert document["cost"] == {}
    assert "pip install abacus-kit" in document["not_installed"]["wood"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cost",), "onnxruntime estimates no cycles; name a chip"),
        (("--hardware", "stone"), "unknown hardware 'stone'; use one of"),
        (("--keep", "somewhere"), "onnxruntime makes no file to keep"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, said, graphs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = verify(graphs, *arguments)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert said in refused.stderr
    assert not (tmp_path / "somewhere").exists()
