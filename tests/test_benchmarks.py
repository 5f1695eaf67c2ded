import importlib
import os
import subprocess
import sys

import numpy as np
import pytest

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
    ("mode", "count", "said"), [("files", 12, "refused"), ("values", 2e4, "values of seeds")]
)
def test_a_short_soak_finds_nothing(mode, count, said, pytestconfig):
    done = run(pytestconfig.rootpath, "benchmarks/soak.py", mode, "--count", count, "--seed", 7)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout
    assert done.stdout.endswith("0 faults\n")


def test_a_soak_prints_the_seed_of_a_fault(pytestconfig, tmp_path):
    root = pytestconfig.rootpath
    # A reader that fails on everything.
    broken = (
        (root / "benchmarks" / "soak.py").read_text().replace("plan = Plan.load(path)", "plan = {}[path]")
    )
    (tmp_path / "soak.py").write_text(broken.replace("reader(path, random.Random(1))", "pass"))
    for name in ("kills.py", "mutations.py", "random_plans.py"):
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
