"""Fused kernels on a device: the simulator's bits, and every element written.

Run on a machine with a CUDA device, or slowly anywhere with Triton and
TRITON_INTERPRET=1.
"""

import logging
import os

import pytest
import torch

import qinvert
from qinvert.execution.simulator import simulate_batched
from qinvert.kernels import Precision, dispatch, launch, solve_tril
from qinvert.kernels.generator import float_kernel, integer_kernel
from qinvert.program.residual_sums import residuals_as_sums
from qinvert.simulation import simulate_counting
from qinvert.stress import STRESS, stress_matrices
from qinvert.systems import Systems

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and launch.missing() is None
DEVICE = "cuda" if CUDA else "cpu"

pytestmark = pytest.mark.skipif(
    not (CUDA or INTERPRETED), reason="no CUDA device, and no Triton with TRITON_INTERPRET=1"
)
needs_cuda = pytest.mark.skipif(not CUDA, reason="no CUDA device on this machine")


@pytest.fixture(autouse=True)
def kernels_only(caplog):
    with caplog.at_level(logging.WARNING, "qinvert"):
        yield


def everything(chunk, count, seed=3):
    return torch.cat([stress_matrices(name, count, chunk, seed=seed) for name in STRESS])


def rows(lower):
    return lower.reshape(1, -1, 1, lower.shape[-1]).to(DEVICE)


LAYOUTS = (
    {"base": 1},
    {"base": 4},
    {"base": 16},
    {"base": 1, "layout": "masked"},
    {"base": 2, "tile": 16},
    {"base": 2, "tile": 16, "corrections": 1},
)


@pytest.mark.parametrize("target", ["npu-qdq-int8", "int-ops"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("chunk", [16, 32])
def test_every_layout_equals_the_simulator(chunk, layout, target):
    lower = everything(chunk, 2)
    program = qinvert.block_merge(chunk, **layout)
    plan = qinvert.calibrate(lower, method=program, bits=8, target=target, min_sqnr_db=0).layer()
    integer_kernel(plan)  # raises if there is none
    result = solve_tril(rows(lower), plan=plan).cpu().reshape(lower.shape)
    assert torch.equal(result, simulate_batched(plan, Systems(lower=lower)))


@pytest.mark.parametrize("target", ["npu-qdq-int8", "int-ops"])
@pytest.mark.parametrize(
    "options", [{}, {"side": "right"}, {"tile": 16}, {"tile": 16, "corrections": 1}, {"restart": 4}], ids=str
)
def test_elimination_equals_the_simulator(options, target):
    lower = everything(32, 2)
    program = qinvert.elimination(32, **options)
    plan = qinvert.calibrate(lower, method=program, bits=8, target=target, min_sqnr_db=0).layer()
    integer_kernel(plan)
    for matrices in (lower, 2 * lower):
        result = solve_tril(rows(matrices), plan=plan).cpu().reshape(lower.shape)
        assert torch.equal(result, simulate_batched(plan, Systems(lower=matrices)))


@pytest.mark.parametrize("split", [False, True], ids=["products", "sums"])
def test_partial_steps_equal_the_simulator(split):
    lower, program = everything(32, 2), qinvert.elimination(32, "right", radix=4)
    program = residuals_as_sums(program) if split else program
    plan = qinvert.calibrate(lower, method=program, bits=8, min_sqnr_db=0).layer()
    integer_kernel(plan)
    result = solve_tril(rows(lower), plan=plan).cpu().reshape(lower.shape)
    assert torch.equal(result, simulate_batched(plan, Systems(lower=lower)))


@pytest.mark.parametrize("scales", ["float", "pow2"])
@pytest.mark.parametrize("bits", [4, 8, "8x2", "auto"])
def test_every_format_equals_the_simulator(bits, scales):
    lower = everything(32, 2)
    goals = {"target": "int-ops", "min_sqnr_db": 45} if bits == "auto" else {"min_sqnr_db": 0}
    plan = qinvert.calibrate(lower, bits=bits, scales=scales, **goals).layer()
    integer_kernel(plan)
    # Twice the range that the plan has seen: saturated values count, too.
    for matrices in (lower, 2 * lower):
        result = solve_tril(rows(matrices), plan=plan).reshape(matrices.shape)
        assert torch.equal(result.cpu(), simulate_batched(plan, Systems(lower=matrices)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_input_type_equals_the_simulator(dtype):
    lower = everything(16, 2).to(dtype)
    plan = qinvert.calibrate(lower, bits=8, min_sqnr_db=0).layer()
    result = solve_tril(rows(lower), plan=plan).cpu().reshape(lower.shape)
    assert torch.equal(result, simulate_batched(plan, Systems(lower=lower)))


@needs_cuda
@pytest.mark.parametrize("scales", ["float", "pow2"])
@pytest.mark.parametrize("chunk", [64, 128])
@pytest.mark.parametrize("bits", [8, "8x2"])
@pytest.mark.parametrize("method", ["block_merge", "elimination"])
def test_large_chunks_equal_the_simulator(method, bits, chunk, scales):
    lower = everything(chunk, 2)
    if method == "elimination":
        program = qinvert.elimination(chunk, tile=16)
    else:
        program = qinvert.block_merge(chunk, base=2, tile=16)
    plan = qinvert.calibrate(lower, method=program, bits=bits, scales=scales, min_sqnr_db=0).layer()
    integer_kernel(plan)
    for matrices in (lower, 2 * lower):
        result = solve_tril(rows(matrices), plan=plan).reshape(matrices.shape)
        assert torch.equal(result.cpu(), simulate_batched(plan, Systems(lower=matrices)))


@pytest.mark.parametrize("bits", [8, "8x2"])
def test_long_kernels_equal_the_simulator(bits):
    # Their tiles of the diagonal are in one loop.
    lower = stress_matrices("repeated_keys", 2, 128, seed=5)
    program = qinvert.elimination(128, tile=16)
    plan = qinvert.calibrate(lower, method=program, bits=bits, min_sqnr_db=0).layer()
    assert "for p in tl.range(0, 8" in integer_kernel(plan).text
    result = solve_tril(rows(lower), plan=plan).cpu().reshape(lower.shape)
    assert torch.equal(result, simulate_batched(plan, Systems(lower=lower)))


def test_counts_of_saturated_values_equal_the_simulator(monkeypatch):
    lower = 3 * everything(32, 1)
    plan = qinvert.calibrate(lower / 3, bits="8x2", min_sqnr_db=0).layer()
    expected = simulate_counting(plan, Systems(lower=lower))
    result, counts = dispatch.fused_inverse(plan, lower.to(DEVICE), count=True)
    assert torch.equal(result.cpu(), expected[0])
    assert counts == expected[1]
    assert counts


@pytest.mark.parametrize("precision", [p for p in Precision if CUDA or p != "bf16"])
@pytest.mark.parametrize("chunk", [16, 32, 64, *([128] if CUDA else [])])
def test_float_kernels_reach_their_precision(chunk, precision):
    lower = stress_matrices("independent_keys", 5, chunk, seed=1)
    truth = qinvert.exact_inverse(lower)
    result = solve_tril(rows(lower), precision=precision).cpu().reshape(lower.shape)
    limit = {"fp16": 3e-4, "tf32": 6e-4, "bf16": 4e-3}.get(precision, 1e-6)
    assert float((result - truth).norm() / truth.norm()) < limit
    assert torch.equal(result.triu(1), torch.zeros_like(result))
    assert torch.equal(result.diagonal(dim1=-2, dim2=-1), torch.ones(5, chunk))


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("ends", [None, [0, 21, 21, 37, 90]])
def test_every_element_is_written_and_no_other(ends, planned):
    length, heads, chunk = 90, 3, 16
    batch = 2 if ends is None else 1
    A = torch.randn(batch, length, heads, chunk, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 0.2
    plan = (
        qinvert.calibrate(stress_matrices("correlated_keys", 32, 16, seed=1), bits=8).layer()
        if planned
        else None
    )
    generated = (
        integer_kernel(plan, interpreted=launch.interpreted())
        if planned
        else float_kernel(chunk, Precision.FP16X3, False)
    )
    memory = torch.full((A.numel() + 2048,), float("nan"), device=DEVICE)
    result = memory[1024:-1024].view(A.shape)
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    table = None if ends is None else dispatch.chunk_table(cu_seqlens, chunk)
    launch.launch(generated, A, result, cu_seqlens, table)
    assert torch.isnan(memory[:1024]).all()
    assert torch.isnan(memory[-1024:]).all()
    expected = torch.empty_like(result, device="cpu")
    dispatch._solve_batched(
        A.cpu(), *(t if t is None else t.cpu() for t in (cu_seqlens, table)), plan, expected
    )
    if planned:
        assert torch.equal(result.cpu(), expected)
    assert torch.allclose(result.cpu(), expected, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_odd_batches(count):
    lower = everything(16, 1)[:count]
    plan = qinvert.calibrate(everything(16, 2), bits="8x2", min_sqnr_db=0).layer()
    result = solve_tril(rows(lower), plan=plan).cpu().reshape(lower.shape)
    assert torch.equal(result, simulate_batched(plan, Systems(lower=lower)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp16", *(["bf16"] if CUDA else [])])
def test_no_stress_set_overflows_a_half_precision(precision, dtype):
    chunk = 64
    lower = everything(chunk, 2).to(dtype)
    result = solve_tril(rows(lower), precision=precision, output_dtype=dtype)
    assert torch.isfinite(result).all()


@needs_cuda
def test_plans_and_patches_use_the_kernel_by_themselves(monkeypatch, caplog):
    lower = everything(64, 2)
    plan = qinvert.calibrate(lower, bits=8, min_sqnr_db=0)
    launches = []
    original = launch.launch
    monkeypatch.setattr(launch, "launch", lambda *a, **k: launches.append(1) or original(*a, **k))
    assert torch.equal(plan.layer().inverse(lower.cuda()).cpu(), plan.layer().inverse(lower))
    (on_device,) = qinvert.simulate(plan, lower.cuda()).layers.values()
    assert len(launches) == 2
    (on_cpu,) = qinvert.simulate(plan, lower).layers.values()
    assert on_device.saturations == on_cpu.saturations
    assert on_device.sqnr_db == pytest.approx(on_cpu.sqnr_db)
    assert not caplog.records


@needs_cuda
def test_other_plans_fall_back_with_one_line(caplog):
    lower = everything(32, 1)
    plan = qinvert.calibrate(lower, bits=16, min_sqnr_db=0).layer()
    dispatch._told.clear()
    for _ in range(2):
        assert torch.equal(plan.inverse(lower.cuda()).cpu(), plan.inverse(lower))
    assert len(caplog.records) == 1
    assert "int16" in caplog.text
