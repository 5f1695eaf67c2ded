from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import qinvert
from qinvert.errors import ProgramError
from qinvert.methods import block_merge
from qinvert.program.steps import MIN_BETA, Add, MatMul, Scale
from qinvert.stress import MAX_BETA, from_keys, stress_matrices, unit_keys


def keyed(count: int, seed: int, chunk: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of cosine 0.5, beta uniform in [0, 1], slow gates: what trained models look like."""
    generator = torch.Generator().manual_seed(seed)
    keys = unit_keys(count, chunk, 0.5, generator)
    beta = torch.rand(count, chunk, generator=generator)
    return from_keys(keys, beta, -0.01 * torch.rand(count, chunk, generator=generator)), beta


def row_maxima(lower: torch.Tensor) -> torch.Tensor:
    return lower.abs().amax(-1).clamp(max=2)


@pytest.mark.parametrize("chunk", [2, 4, 8, 32, 128])
@pytest.mark.parametrize("base", [1, 2])
@pytest.mark.parametrize("corrections", [0, 1, 3])
def test_every_size_gives_the_float64_inverse(chunk, base, corrections, solved):
    lower, beta = keyed(3, 0, chunk)
    program = block_merge(chunk, base, factored=True, corrections=corrections)
    result = program.run(lower, dtype=torch.float64, beta=beta)
    assert torch.allclose(result, solved(lower), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["half_random", "repeated_keys", "negative_eigenvalues", "filled_blocks"])
def test_hard_matrices_stay_exact(name, solved):
    lower = stress_matrices(name, 3, 64)
    exact = solved(lower)
    result = block_merge(64, factored=True).run(lower, dtype=torch.float64, beta=row_maxima(lower))
    assert torch.allclose(result, exact, rtol=0, atol=1e-11 * exact.abs().max())


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 3e-3), (torch.bfloat16, 3e-2)]
)
def test_storage_types_round_every_step(dtype, bound, solved):
    lower, beta = keyed(4, 1)
    result = block_merge(64, factored=True).run(lower, dtype=dtype, beta=beta)
    assert result.dtype == dtype
    error = torch.linalg.matrix_norm(result.double() - solved(lower)) / torch.linalg.matrix_norm(
        solved(lower)
    )
    assert (error < bound).all()
    assert dtype == torch.float32 or (error > bound / 100).all()


def test_a_correction_removes_rounding_errors(solved):
    lower, beta = keyed(4, 1)
    errors = [
        torch.linalg.matrix_norm(
            block_merge(64, factored=True, corrections=k).run(lower, torch.float16, beta=beta).double()
            - solved(lower)
        )
        for k in (0, 1)
    ]
    assert (errors[1] < errors[0]).all()


def test_every_product_reads_what_it_adds_without_corrections():
    products = [s for s in block_merge(64, factored=True).steps if isinstance(s, MatMul)]
    assert len(products) == 10
    assert all({*p.add, *p.subtract} <= {p.left, p.right} for p in products)
    corrected = block_merge(64, factored=True, corrections=2)
    assert corrected.cost().matmuls == 14
    assert sum(isinstance(step, Scale) for step in corrected.steps) == 14
    assert corrected.cost().macs == 14 * 64**3


@pytest.mark.parametrize("base", [1, 2])
@pytest.mark.parametrize("chunk", [2, 64])
@pytest.mark.parametrize("corrections", [0, 1])
def test_the_parameters_of_a_program_make_it_again(base, chunk, corrections):
    program = block_merge(chunk, base, factored=True, corrections=corrections)
    assert block_merge(chunk, **program.parameters) == program
    assert "factored=True" in program.title
    assert program == block_merge(chunk, base, "masked", tile=chunk, factored=True, corrections=corrections)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"base": 4}, "start from base 1 or 2, got base 4"),
        ({"base": 3}, r"base 3 is not a power of two in \[1, 64\]"),
        ({"layout": "packed"}, "factored merges are masked .* got base 2, layout 'packed'"),
        ({"layout": "dense"}, "layout 'dense' is unknown"),
        ({"tile": 16}, "factored merges are masked .* and tile 16; leave them out"),
        ({"tile": 16, "layout": "masked"}, "layout 'masked' means tile=64"),
        ({"corrections": 5}, "corrections 5 is not in"),
        ({"chunk": 48}, "chunk 48 is not a power of two"),
    ],
)
def test_an_illegal_argument_is_named_with_what_is_legal(arguments, words):
    with pytest.raises(ProgramError, match=words):
        block_merge(**{"chunk": 64, "factored": True, **arguments})


@given(data=st.data(), chunk=st.sampled_from([4, 16, 32]), corrections=st.integers(0, 1))
def test_proved_tensors_stay_below_one_or_their_beta(data, chunk, corrections):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    own = rng.normal(size=(chunk, data.draw(st.integers(1, 5))))
    keys = rng.normal(size=own.shape[1]) + data.draw(st.sampled_from([0.0, 0.1, 10.0])) * own
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    top = data.draw(st.sampled_from([0.3, 1.0, 2.0]))
    beta = data.draw(arrays(np.float64, chunk, elements=st.floats(0, top)))
    decay = np.cumsum(data.draw(arrays(np.float64, chunk, elements=st.floats(-3, 0))))
    gates = np.exp(np.minimum(decay[:, None] - decay, 0))
    lower = np.tril(beta[:, None] * (keys @ keys.T) * gates, -1)
    program, seen = block_merge(chunk, factored=True, corrections=corrections), {}
    program.run(lower, dtype=torch.float64, observe=seen.__setitem__, beta=beta)
    b = np.maximum(beta, MIN_BETA)
    for step in program.steps:
        # What a correction measures and adds has no bound.
        assert (step.bound is None) == step.output.endswith(("/R", "/update"))
        if step.bound is None:
            continue
        limit = 1.0
        if isinstance(step, Scale):
            limit = b[:, None] if step.axis == "rows" else b[None]
        assert (seen[step.output][0].abs().numpy() <= step.bound * limit + 1e-6).all(), step.output


@pytest.mark.parametrize("name", MAX_BETA)
def test_proved_tensors_stay_below_their_bounds_on_every_stress_set(name):
    lower, seen = stress_matrices(name, 4, 64), {}
    program = block_merge(64, factored=True)
    # The stress sets keep their beta to themselves; any one that their rows can have is legal.
    beta = torch.full(lower.shape[:2], MAX_BETA[name], dtype=torch.float64)
    program.run(lower.double(), dtype=torch.float64, observe=seen.__setitem__, beta=beta)
    for step in program.steps:
        limit = MAX_BETA[name] if isinstance(step, Scale) else 1.0
        assert seen[step.output].abs().max() <= limit + 1e-6, step.output


def test_merges_of_one_grid_round_once():
    program = block_merge(64, factored=True)
    lower, beta = keyed(64, 0)
    plan = qinvert.calibrate((lower, beta), method=program, bits=8).layer()
    grids = {
        plan.tensors[name] for s in program.steps if isinstance(s, Add) for name in (*s.inputs, s.output)
    }
    assert len(grids) == 1


def test_rows_with_a_small_beta_gain_three_decibels(capsys):
    seen, unseen = keyed(256, 0), keyed(256, 1)
    reports = {}
    for name, method in (
        ("plain", block_merge(64, 2, "masked")),
        ("factored", block_merge(64, factored=True)),
    ):
        plan = qinvert.calibrate(seen, method=method, bits=8)
        reports[name] = qinvert.simulate(plan, unseen).layers["layer"]
    gain = reports["factored"].sqnr_db - reports["plain"].sqnr_db
    floor_gain = reports["factored"].floor_db - reports["plain"].floor_db
    with capsys.disabled():
        plain, factored = (r.sqnr_db for r in reports.values())
        print(f"\nint8: {plain:.1f} dB plain, {factored:.1f} factored (+{gain:.1f}; floor +{floor_gain:.1f})")
    assert 3 < gain < 4
    assert 3.5 < floor_gain < 6.1
    assert reports["factored"].loss_db < 2.5
