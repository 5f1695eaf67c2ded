"""`solve_tril` without a GPU: flash-linear-attention's layout, and the torch path."""

import logging
from itertools import pairwise

import pytest
import torch

import qinvert
from qinvert.errors import InputError
from qinvert.kernels import Precision, dispatch, launch, solve_tril
from qinvert.kernels.tiles import UnsupportedError
from qinvert.simulation import simulate_counting
from qinvert.stress import stress_matrices
from qinvert.systems import Systems


@pytest.fixture(autouse=True)
def torch_path(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="module")
def plan():
    return qinvert.calibrate(stress_matrices("correlated_keys", 32, 16, seed=1), bits=8).layer()


def matrices(batch, length, heads, chunk, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, heads, chunk, generator=generator) * 0.2


def expected(A, ends, inverse):
    """The definition: chunk by chunk, sequence by sequence, head by head."""
    batch, _, heads, chunk = A.shape
    result = torch.zeros_like(A)
    for b in range(batch):
        for begin, end in pairwise(ends):
            for start in range(begin, end, chunk):
                rows = min(chunk, end - start)
                for h in range(heads):
                    lower = torch.zeros(chunk, chunk)
                    lower[:rows] = A[b, start : start + rows, h]
                    result[b, start : start + rows, h] = inverse(lower.tril(-1))[:rows]
    return result


@pytest.mark.parametrize("chunk", [16, 32, 64, 128])
@pytest.mark.parametrize("rest", [0, 1, 13])
def test_tails_and_heads(chunk, rest):
    A = matrices(2, 2 * chunk + rest, 3, chunk) / chunk
    truth = expected(A, [0, A.shape[1]], qinvert.exact_inverse)
    assert torch.allclose(solve_tril(A), truth, atol=1e-6)


@pytest.mark.parametrize("ends", [[0, 7, 40], [0, 32, 33, 80], [0, 0, 16, 16, 50]])
def test_sequences_of_any_length(ends, plan):
    A = matrices(1, ends[-1], 2, 16)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    truth = expected(A, ends, qinvert.exact_inverse)
    assert torch.allclose(solve_tril(A, cu_seqlens), truth, atol=1e-6)
    table = dispatch.chunk_table(cu_seqlens, 16)
    assert torch.equal(solve_tril(A, cu_seqlens, table), solve_tril(A, cu_seqlens))
    assert torch.equal(solve_tril(A, cu_seqlens, plan=plan), expected(A, ends, plan.inverse))


def test_types_follow_the_arguments():
    A = matrices(1, 32, 1, 16).bfloat16()
    assert solve_tril(A).dtype == torch.float32
    assert solve_tril(A, output_dtype=None).dtype == torch.bfloat16
    assert solve_tril(A, output_dtype=torch.float16).dtype == torch.float16
    assert solve_tril(A[:, :0]).shape == (1, 0, 1, 16)
    strided = matrices(1, 2, 32, 16).transpose(1, 2)
    assert torch.equal(solve_tril(strided), solve_tril(strided.contiguous()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"A": torch.zeros(1, 8, 2, 8)}, "size 8"),
        ({"A": torch.zeros(8, 16)}, r"\[batch, time, heads, C\]"),
        ({"A": torch.zeros(1, 16, 1, 16, dtype=torch.int32)}, "float tensor"),
        ({"A": [[1.0]]}, "list"),
        ({"precision": "fp8"}, "fp16x3"),
        ({"cu_seqlens": torch.tensor([0.0, 16.0])}, "vector of integers"),
        ({"cu_seqlens": torch.tensor([[0, 16]])}, "vector of integers"),
        ({"A": torch.zeros(2, 16, 1, 16), "cu_seqlens": torch.tensor([0, 16])}, "batch 1"),
    ],
)
def test_illegal_arguments_are_refused(change, words):
    arguments = {"A": torch.zeros(1, 16, 1, 16)} | change
    with pytest.raises(InputError, match=words):
        solve_tril(**arguments)


def test_a_plan_fixes_chunk_and_beta(plan):
    with pytest.raises(InputError, match="the legal sizes are 16"):
        solve_tril(torch.zeros(1, 64, 1, 64), plan=plan)
    lower = stress_matrices("correlated_keys", 8, 16, seed=1)
    factored = qinvert.calibrate([(lower, torch.ones(8, 16))], bits=8, factored=True).layer()
    with pytest.raises(InputError, match=r"plan.inverse\(L, beta\)"):
        solve_tril(torch.zeros(1, 16, 1, 16), plan=factored)


def test_the_log_says_once_why_there_is_no_kernel(plan, monkeypatch, caplog):
    A = torch.zeros(1, 16, 1, 16)
    monkeypatch.setattr(launch, "interpreted", lambda: True)
    monkeypatch.setattr(launch, "missing", lambda: None)
    monkeypatch.setattr(dispatch, "_told", set())

    def refuse(plan, count, interpreted):
        assert interpreted
        raise UnsupportedError("a reason of its own")

    monkeypatch.setattr(dispatch, "integer_kernel", refuse)
    monkeypatch.setattr(dispatch, "_kernels", type(dispatch._kernels)())
    with caplog.at_level(logging.WARNING, "qinvert"):
        results = [solve_tril(A, plan=plan) for _ in range(3)]
    assert [record.getMessage() for record in caplog.records] == [
        "no fused kernel: a reason of its own; the batched torch path runs instead"
    ]
    assert torch.equal(results[0][0, :, 0], torch.eye(16))


def test_without_triton_the_torch_path_runs(monkeypatch, caplog):
    monkeypatch.setattr(launch, "interpreted", lambda: True)
    monkeypatch.setattr(launch, "find_spec", lambda _: None)
    monkeypatch.setattr(dispatch, "_told", set())
    with caplog.at_level(logging.WARNING, "qinvert"):
        solve_tril(torch.zeros(1, 16, 1, 16), precision=Precision.BF16)
    assert "pip install 'qinvert[gpu]'" in caplog.text


def test_a_failing_compiler_leaves_the_torch_path(plan, monkeypatch, caplog):
    def fail(text):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(launch, "interpreted", lambda: True)
    monkeypatch.setattr(launch, "missing", lambda: None)
    monkeypatch.setattr(launch, "compiled", fail)
    monkeypatch.setattr(dispatch, "_told", set())
    A = matrices(1, 32, 1, 16)
    with caplog.at_level(logging.WARNING, "qinvert"):
        result = solve_tril(A, plan=plan)
        assert dispatch.fused_inverse(plan, A[0, :16, 0].tril(-1)[None]) is None
    assert torch.equal(result, expected(A, [0, 32], plan.inverse))
    assert "Failed to find C compiler" in caplog.text


def test_saturations_are_counted_like_values(plan):
    lower = 4 * stress_matrices("correlated_keys", 4, 16, seed=2)
    inverse, counts = simulate_counting(plan, Systems(lower=lower))
    assert torch.equal(inverse, plan.inverse(lower))
    assert counts["M"] > 0
    assert simulate_counting(plan, Systems(lower=0 * lower))[1] == {}
