from __future__ import annotations

import numpy as np
import pytest
import torch

from qinvert.errors import ProgramError
from qinvert.methods import neumann, neumann_doubling
from qinvert.stress import MAX_BETA, stress_matrices


@pytest.mark.parametrize("chunk", [2, 4, 8, 16, 32, 64, 128])
def test_repeated_squaring_is_the_float64_inverse(chunk, solved):
    lower = stress_matrices("small_random", 3, chunk)
    result = neumann_doubling(chunk).run(lower, dtype=torch.float64)
    assert torch.allclose(result, solved(lower), rtol=0, atol=1e-11)


@pytest.mark.parametrize("chunk", [4, 16])
def test_it_sums_the_same_series_as_neumann(chunk):
    lower = stress_matrices("ones", 2, chunk)
    series = neumann(chunk, chunk - 1).run(lower, dtype=torch.float64)
    assert torch.allclose(neumann_doubling(chunk).run(lower, dtype=torch.float64), series, rtol=0, atol=1e-9)


def test_tensors_are_the_powers_and_partial_sums_they_are_called():
    lower = stress_matrices("half_random", 2, 16).double()
    seen = {}
    neumann_doubling(16).run(lower, dtype=torch.float64, observe=seen.__setitem__)
    powers = [np.linalg.matrix_power(-lower.numpy(), k) for k in range(16)]
    for k in (2, 4, 8):
        assert np.allclose(seen[f"power_{k}"], powers[k], rtol=0, atol=1e-12)
        assert np.allclose(seen[f"sum_{2 * k}"], sum(powers[1 : 2 * k]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("chunk", "products"), [(2, 0), (4, 2), (16, 6), (64, 10), (128, 12)])
def test_two_products_per_doubling(chunk, products):
    assert neumann_doubling(chunk).cost().matmuls == products


@pytest.mark.parametrize("chunk", [0, 1, 3, 2048, "64", None])
def test_an_illegal_chunk_is_refused(chunk):
    with pytest.raises(ProgramError, match=r"chunk .* is not a power of two"):
        neumann_doubling(chunk)


def test_no_range_is_claimed_and_powers_do_exceed_the_bound_of_the_inverse(solved):
    lower = stress_matrices("repeated_keys", 2, 64)
    program = neumann_doubling(64)
    ranges = {}
    program.run(
        lower, dtype=torch.float64, observe=lambda name, x: ranges.setdefault(name, float(x.abs().max()))
    )
    assert all(step.bound is None for step in program.steps)
    assert torch.tril(solved(lower), -1).abs().max() <= MAX_BETA["repeated_keys"] + 1e-6
    assert ranges["power_2"] > 10 * MAX_BETA["repeated_keys"]
    assert ranges["power_8"] > 1e6
