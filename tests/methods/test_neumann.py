from __future__ import annotations

import numpy as np
import pytest
import torch

from qinvert.errors import ProgramError
from qinvert.methods import neumann
from qinvert.stress import stress_matrices


@pytest.mark.parametrize("chunk", [2, 4, 8, 16, 32, 64, 128])
def test_the_full_series_is_the_float64_inverse(chunk, solved):
    lower = stress_matrices("small_random", 3, chunk)
    result = neumann(chunk, chunk - 1).run(lower, dtype=torch.float64)
    assert torch.allclose(result, solved(lower), rtol=0, atol=1e-11)


@pytest.mark.parametrize("order", [1, 2, 3, 7, 14])
def test_a_truncated_series_is_exact_on_its_band_and_only_there(order, solved):
    lower = stress_matrices("repeated_keys", 2, 16)
    exact = solved(lower)
    error = (neumann(16, order).run(lower, dtype=torch.float64) - exact).abs()
    band = torch.triu(torch.ones(16, 16), -order).bool()
    assert error[:, band].max() < 1e-9
    assert error[:, ~band].max() > 1e-2


@pytest.mark.parametrize("order", [1, 2, 5, 15])
def test_the_sum_is_the_sum_of_the_powers(order):
    lower = stress_matrices("half_random", 2, 16).double()
    expected = sum(np.linalg.matrix_power(-lower.numpy(), k) for k in range(order + 1))
    seen = {}
    result = neumann(16, order).run(lower, dtype=torch.float64, observe=seen.__setitem__)
    assert np.allclose(result, expected, rtol=0, atol=1e-12)
    for k in range(2, order + 1):
        assert np.allclose(seen[f"power_{k}"], np.linalg.matrix_power(-lower.numpy(), k), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 15, 63])
def test_one_product_and_one_scale_per_power(order):
    program = neumann(64, order)
    assert program.cost().matmuls == program.cost().depth == order - 1
    assert sum(name.startswith("power_") for name in program.tensors) == order - 1
    assert program.parameters == {"order": order}


def test_no_range_is_claimed():
    assert all(step.bound is None for step in neumann(64).steps)


@pytest.mark.parametrize("order", [0, -1, 64, 1000, 3.0, "3", True])
def test_an_order_outside_the_nilpotent_range_is_refused(order):
    with pytest.raises(ProgramError, match=r"order .* is not in \[1, 63\]; chunk - 1 is exact"):
        neumann(64, order)


@pytest.mark.parametrize("chunk", [0, 1, 48, 64.0, 2048])
def test_an_illegal_chunk_is_refused(chunk):
    with pytest.raises(ProgramError, match=r"chunk .* is not a power of two"):
        neumann(chunk, 1)


def test_the_default_order_fits_every_chunk():
    assert neumann(8).run(torch.zeros(8, 8)).tolist() == torch.eye(8).tolist()
