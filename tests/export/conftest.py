import pytest
import torch

import qinvert
from qinvert.stress import STRESS, stress_matrices


@pytest.fixture(scope="session")
def everything():
    """Return a function of (C, count): so many matrices of every stress set."""
    return lambda chunk, count: torch.cat([stress_matrices(name, count, chunk, seed=7) for name in STRESS])


@pytest.fixture
def agree(tmp_path, capsys):
    """Return a function that exports a plan and asserts that at most a share of 1e6 values differ."""

    def check(plan, lower, share, label):
        qinvert.export(plan, tmp_path / "t.onnx", batch=64, chains=1)
        for result in qinvert.verify(tmp_path / "t.onnx", plan, lower):
            if result.mismatches:
                with capsys.disabled():
                    print(f"\n{label}: {result}, steps: {result.max_steps:.3g}")
            assert result.values >= lower.numel() > 1e6
            assert result.exact == (share == 0)
            assert result.mismatches <= share * result.values
            assert result.max_steps < 1.5

    return check
