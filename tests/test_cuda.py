"""The simulator gives the same bits on a CUDA device."""

import pytest
import torch

import qinvert
from qinvert.stress import STRESS, stress_matrices

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.mark.parametrize("scales", ["float", "pow2"])
@pytest.mark.parametrize("bits", [4, 8, "8x2", 16])
@pytest.mark.parametrize("method", ["auto", "block_merge", "banded_residual", "newton_schulz"])
def test_cuda_equals_the_cpu_bit_for_bit(method, bits, scales, monkeypatch):
    # TF32 would round operands of float32 products; quantized ones must not care.
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    lower = torch.cat([stress_matrices(name, 16, 64, seed=11) for name in STRESS])
    plan = qinvert.calibrate(lower[::4], method=method, bits=bits, scales=scales, min_sqnr_db=0).layer()
    expected = plan.inverse(lower)
    result = plan.inverse(lower.cuda())
    assert result.is_cuda
    assert torch.equal(result.cpu(), expected)
