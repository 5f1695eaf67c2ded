import importlib
import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest

import qinvert
from qinvert.errors import ExportError
from qinvert.export.runtimes import CycleEstimate
from qinvert.matrices import exact_inverse
from qinvert.stress import stress_matrices


def run(root, *arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("mode", "count", "processes", "said"),
    [
        ("files", 12, 1, "refused"),
        ("values", 2e4, 2, "values of seeds 8 to "),
        ("steps", 5e3, 1, "values of seeds 7 to "),
    ],
)
def test_a_short_soak_finds_nothing(mode, count, processes, said, pytestconfig):
    options = ("--count", count, "--seed", 7, "--processes", processes)
    done = run(pytestconfig.rootpath, "benchmarks/soak.py", mode, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout
    assert done.stdout.endswith("0 faults\n")


def test_a_soak_ends_in_time_and_counts_what_was_done(pytestconfig):
    options = ("--count", 1e9, "--minutes", 0, "--seed", 7)
    done = run(pytestconfig.rootpath, "benchmarks/soak.py", "values", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("0 faults\n")
    assert "0 values in " in done.stdout


def test_a_soak_prints_the_seed_of_a_fault(pytestconfig, tmp_path):
    root = pytestconfig.rootpath
    # A reader that fails on everything.
    broken = (
        (root / "benchmarks" / "soak.py").read_text().replace("plan = Plan.load(path)", "plan = {}[path]")
    )
    (tmp_path / "soak.py").write_text(broken.replace("reader(path, random.Random(1))", "pass"))
    for name in ("hosts.py", "kills.py", "mutations.py", "random_plans.py", "random_steps.py"):
        (tmp_path / name).write_bytes((root / "benchmarks" / name).read_bytes())
    done = run(root, tmp_path / "soak.py", "files", "--count", 12, "--seed", 7)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "plan: KeyError" in done.stdout
    assert "seed " in done.stdout


def test_the_benchmark_of_runtimes_runs_as_documented(pytestconfig):
    # One small case, once: that it runs and names its rows, not how fast they are.
    command = [sys.executable, "benchmarks/runtimes.py", "--chunks", "16", "--threads", "1", "--batches", "2"]
    root = pytestconfig.rootpath
    done = subprocess.run(
        [*command, "--profiles", "npu-qdq-int8", "--rounds", "1", "--limit", "0.01", "--spent"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for row in ("npu-qdq-int8", "solve_triangular", "copy"):
        assert row in done.stdout


@pytest.fixture
def sequential(pytestconfig, monkeypatch):
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    yield importlib.import_module("sequential_graphs")
    for name in ("sequential_graphs", "integer_graph", "float_graphs"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("element", "least"), [("int8", 25), ("uint8", 25), ("float16", 55)])
def test_every_sequential_baseline_computes_the_inverse(element, least, sequential):
    # A baseline that is wrong would be no baseline.
    for data in sequential.DATA:
        lower = stress_matrices(data, 8, 16).numpy()
        for name, form in sequential.FORMS.items():
            for chains in (1, 2):
                model, found = sequential.sequential(form, element, chains, lower)
                assert found > least, (data, name, chains)
                # C - 2 steps that wait for each other, whichever operator multiplies.
                kinds = [node.op_type for node in model.graph.node]
                products = kinds.count("MatMul") + ("vector" in name) * kinds.count("Mul")
                assert products == 14 * chains


def test_a_wrong_baseline_is_found(sequential):
    lower = stress_matrices("half_random", 4, 16).numpy()
    assert sequential.sqnr_db(np.zeros_like(lower), lower) == pytest.approx(0, abs=1e-6)


def test_a_batch_that_makes_no_equal_chains_is_refused(sequential):
    with pytest.raises(ValueError, match="4 matrices do not make 3 equal parts"):
        sequential.sequential(sequential.horner, "int8", 3, stress_matrices("half_random", 4, 16).numpy())


@pytest.fixture
def float_graphs(pytestconfig, monkeypatch):
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    yield importlib.import_module("float_graphs")
    sys.modules.pop("float_graphs", None)


@pytest.mark.parametrize(
    "program",
    [
        qinvert.block_merge(16, base=4),
        qinvert.block_merge(16, base=2, layout="masked"),
        qinvert.elimination(16, tile=8),
        qinvert.newton_schulz(16),
    ],
    ids=lambda program: program.title,
)
def test_float_graphs_compute_what_their_programs_do(program, float_graphs):
    # Packed programs stack blocks of the input, and constants among them.
    lower = stress_matrices("correlated_keys", 4, 16)
    truth = exact_inverse(lower).numpy()
    (whole,) = computed(float_graphs.float_graph(program, 4), -lower[None].numpy())
    assert np.abs(whole - truth).max() < 1e-5
    halves = [-lower[None].numpy().astype(np.float16)]
    for chains in (1, 2):
        (found,) = computed(float_graphs.half_graph(program, 4, chains), *halves)
        assert found.dtype == np.float16
        assert np.abs(found + np.eye(16) - truth).max() < 1e-2


def computed(model, *given):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"M": given[0]})[0]


@pytest.fixture
def npu(pytestconfig, monkeypatch):
    """The script with a compiler that counts nodes, and has no cost for float16."""
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    before = set(sys.modules)
    module = importlib.import_module("npu")
    module.asked = []

    def estimates(contents, hardware):
        for content in contents:
            model = onnx.load_model_from_string(content)
            module.asked.append(hardware)
            if model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16:
                yield ExportError("toy: 3 operators of this graph have no cost there")
            else:
                source = f"counted for {hardware}; not measured"
                yield CycleEstimate(hardware=hardware, cycles=len(model.graph.node), source=source)

    monkeypatch.setattr(module, "estimates", estimates)
    yield module
    own = {file.stem for file in (pytestconfig.rootpath / "benchmarks").glob("*.py")}
    for name in own & (set(sys.modules) - before):
        del sys.modules[name]


CHIPS = ("hexagon-v81", "ethos-u85-256")


def contenders(npu, *names):
    return [contender for contender in npu.CONTENDERS if contender.name in names]


def cells(text, *starts):
    """The rows of the page whose cells begin like that, each as a list."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line]
    return [row for row in rows if row[: len(starts)] == list(starts)]


def test_the_page_of_npus_compares_with_the_best_sequential_graph(npu, tmp_path):
    names = ("left, sums", "packed tiles of 32, sums", "rows, growing", "Horner's rule")
    asked = list(npu.cases(CHIPS, contenders(npu, *names), 16))
    # Two matrices fill no chains, and tiles of 32 are larger than the matrices.
    assert not any("tiles" in case.contender.name for case in asked if case.chunk < 64)
    cache = npu.Cache(tmp_path / "npu.jsonl")
    found = npu.measured(asked, cache, 2, npu.model_of)
    assert list(found) == asked
    text = npu.page(found, [], npu.predictions(found), 16)
    counted = {case: len(npu.model_of(case).graph.node) for case in asked if case.element == "uint8"}

    def best(name):
        return min(
            count
            for case, count in counted.items()
            if case.contender.name == name and (case.chunk, case.batch) == (16, 8)
        )

    ratio = best("Horner's rule") / best("left, sums")
    assert f"{ratio:.1f} times fewer than the best sequential graph" in text
    ratio = best("rows, growing") / best("left, sums")
    assert f"{ratio:.1f} times fewer than the best forward substitution" in text
    assert "counted for ethos-u85-256; not measured" in text
    assert [row[-1] for row in cells(text, "", "", "float16")] == ["no cost"] * 3
    assert "Nothing was refused." in text


def test_what_is_known_is_not_compiled_again(npu, tmp_path):
    asked = list(npu.cases(CHIPS[:1], contenders(npu, "left, sums"), 16))
    cache = npu.Cache(tmp_path / "npu.jsonl")
    first = npu.measured(asked[:4], cache, 1, npu.model_of)
    assert len(npu.asked) == 4
    again = npu.Cache(tmp_path / "npu.jsonl")
    assert npu.measured(asked[:4], again, 2, npu.model_of) == first
    assert npu.measured(asked, again, 0, npu.model_of) == first
    assert len(npu.asked) == 4
    npu.measured(asked, again, 2, npu.model_of)
    assert len(npu.asked) == len(asked)


def test_a_graph_that_changed_is_another_one_and_its_description_is_not(npu):
    case = next(npu.cases(CHIPS[:1], contenders(npu, "left, sums"), 16))
    model, same = npu.model_of(case), npu.model_of(case)
    same.graph.doc_string = "other words"
    same.metadata_props[0].value = "another version"
    assert npu.digest(same) == npu.digest(model)
    same.graph.node[0].name = "other"
    assert npu.digest(same) != npu.digest(model)


def test_a_chip_whose_compiler_is_not_installed_is_left_out_with_one_line(npu, monkeypatch, capsys):
    monkeypatch.setattr(npu, "installed", lambda: ["qnn"])
    assert [chip for chip in CHIPS if npu.available(chip)] == ["hexagon-v81"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ethos-u85-256 is left out: vela is not installed; run: pip install ethos-u-vela")
