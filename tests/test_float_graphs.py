"""The float graphs of the benchmarks compute what their programs say."""

import numpy as np
import pytest

import qinvert
from qinvert.export.runtimes.onnxruntime_cpu import open_session
from qinvert.stress import stress_matrices

PROGRAMS = [
    *(qinvert.block_merge(16, base=base) for base in (1, 2, 4, 8, 16)),
    qinvert.block_merge(16, base=4, layout="masked"),
    qinvert.elimination(16),
    qinvert.banded_residual(16, 3, 4),
    qinvert.column_sweep(16),
    qinvert.neumann_doubling(16),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.title)
def test_float_graphs_compute_the_inverse(program, monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    from float_graphs import float_graph

    lower = stress_matrices("small_random", 3, 16).numpy()
    session = open_session(float_graph(program, 3).SerializeToString())
    (found,) = session.run(None, {"M": -lower[None]})
    assert np.allclose(found[0], program.run(lower), rtol=0, atol=1e-6)
