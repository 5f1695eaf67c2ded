"""The simulator gives the same bits on a CUDA device, and models run there."""

from importlib.util import find_spec

import pytest
import torch

import qinvert
from qinvert import recall
from qinvert.calibration.patching import run_model
from qinvert.stress import STRESS, stress_matrices

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.fixture
def reduced_products():
    """Products of float32 tensors may round their operands to TF32; quantized ones must not care."""
    # Not torch.backends.cuda.matmul.allow_tf32, which some versions of torch refuse to restore.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("reduced_products")
@pytest.mark.parametrize("scales", ["float", "pow2"])
@pytest.mark.parametrize("bits", [4, 8, "8x2", 16])
@pytest.mark.parametrize("method", ["auto", "block_merge", "banded_residual", "newton_schulz"])
def test_cuda_equals_the_cpu_bit_for_bit(method, bits, scales):
    lower = torch.cat([stress_matrices(name, 16, 64, seed=11) for name in STRESS])
    plan = qinvert.calibrate(lower[::4], method=method, bits=bits, scales=scales, min_sqnr_db=0).layer()
    expected = plan.inverse(lower)
    result = plan.inverse(lower.cuda())
    assert result.is_cuda
    assert torch.equal(result.cpu(), expected)


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("transformers")
    return recall.load_model().cuda()


def test_a_model_on_cuda_is_patched_captured_and_evaluated(model):
    tokens = recall.sequences(4)
    before = run_model(model, {"input_ids": tokens})
    with qinvert.patched(model, qinvert.exact_inverse):
        inside = run_model(model, {"input_ids": tokens})
    assert before.is_cuda
    # Where flash-linear-attention is installed, transformers runs its kernels, which round to bfloat16.
    limit = 1e-2 * float(before.abs().max()) if find_spec("fla") else 0.0
    assert float((inside - before).abs().max()) <= limit
    assert all(lower.is_cuda for _, lower in qinvert.capture(model, tokens, share=0.5))
    plan = qinvert.calibrate(model, tokens)
    result = qinvert.evaluate(model, plan, tokens, score=recall.accuracy)
    assert result.score == result.exact_score == 1.0
    assert all(errors.out > 30 for errors in result.layers.values())


def test_a_calibration_on_cuda_goes_on_from_a_checkpoint(model, tmp_path):
    batches = [recall.sequences(2, seed) for seed in range(2)]
    options = {"method": "block_merge", "bits": 8, "checkpoint": tmp_path / "c"}

    def cut():
        yield batches[0]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        qinvert.calibrate(model, cut(), **options)
    resumed = qinvert.calibrate(model, batches, **options)
    whole = qinvert.calibrate(model, batches, method="block_merge", bits=8)
    assert {n: p.tensors for n, p in resumed.layers.items()} == {
        n: p.tensors for n, p in whole.layers.items()
    }


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_chunk_rule_on_cuda_equals_the_cpu(per_channel):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 100, 3, 32, generator=generator) for _ in range(3))
    beta = torch.rand(2, 100, 3, generator=generator)
    g = -torch.rand(2, 100, 3, *([32] if per_channel else []), generator=generator)
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    expected = qinvert.chunk_gated_delta_rule(q, k, v, g, beta, **options)
    found = qinvert.chunk_gated_delta_rule(*(x.cuda() for x in (q, k, v, g, beta)), **options)
    for x, y in zip(found, expected, strict=True):
        assert torch.allclose(x.cpu(), y, atol=1e-5)
