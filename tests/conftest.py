from __future__ import annotations

import os

# Before NumPy loads: on matrices this small, BLAS threads only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pathlib
import platform

import numpy as np
import pytest
import torch
from hypothesis import settings

# As above, for torch.
torch.set_num_threads(1)
# No deadline: a slow machine is no bug.  The same examples on every run.
settings.register_profile("qinvert", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("qinvert")


def pytest_runtest_setup(item):
    # onnxruntime's uint8 x int8 products saturate on x86 CPUs without VNNI.
    cpu = pathlib.Path("/proc/cpuinfo")
    x86 = platform.machine() in ("x86_64", "AMD64")
    if "x86" in item.name and x86 and cpu.is_file() and "vnni" not in cpu.read_text():
        pytest.skip("needs VNNI")


def forward_substitution(lower: torch.Tensor) -> torch.Tensor:
    rows = lower.detach().to(torch.float64).numpy()
    inverse = np.broadcast_to(np.eye(rows.shape[-1]), rows.shape).copy()
    for i in range(1, rows.shape[-1]):
        inverse[..., i, :] -= (rows[..., i : i + 1, :i] @ inverse[..., :i, :])[..., 0, :]
    return torch.from_numpy(inverse)


@pytest.fixture(scope="session")
def solved():
    return forward_substitution


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return a small model with its folder, plan and traced graphs, and a deployment of all of these.

    Tracing takes seconds, so that the tests share one trace.
    """
    from deployments import tiny_deployment

    return tiny_deployment(tmp_path_factory.mktemp("tiny"))
