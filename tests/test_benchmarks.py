import importlib
import os
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

import qinvert
from qinvert.matrices import exact_inverse
from qinvert.stress import stress_matrices


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
