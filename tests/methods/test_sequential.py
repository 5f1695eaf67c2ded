from __future__ import annotations

import numpy as np
import pytest
import torch

from qinvert.methods import REGISTRY, column_sweep, forward_substitution
from qinvert.program.steps import MatMul
from qinvert.stress import MAX_BETA, STRESS, stress_matrices

every_method = pytest.mark.parametrize(
    "method", [m.build for m in REGISTRY.values() if m.sequential], ids=lambda m: m.__name__
)


def test_the_references_are_marked_as_such():
    assert [m.build for m in REGISTRY.values() if m.sequential] == [forward_substitution, column_sweep]
    assert all(m.automatic is None for m in REGISTRY.values() if m.sequential)


def arrays_of(program, lower) -> dict[str, np.ndarray]:
    seen = {}
    program.run(lower, dtype=torch.float64, observe=lambda name, x: seen.update({name: x.numpy()}))
    return seen


@every_method
@pytest.mark.parametrize("name", STRESS)
def test_every_stress_set_is_inverted_to_float64_precision(method, name, solved):
    lower = stress_matrices(name, 3, 64)
    exact = solved(lower)
    result = method(64).run(lower, dtype=torch.float64)
    assert torch.allclose(result, exact, rtol=0, atol=1e-13 * exact.abs().max())


@every_method
@pytest.mark.parametrize("name", STRESS)
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e-6), (torch.float16, 5e-3)])
def test_rounding_errors_do_not_grow(method, name, dtype, largest, solved):
    lower = stress_matrices(name, 4, 64)
    exact = solved(lower)
    error = method(64).run(lower, dtype=dtype).double() - exact
    assert (torch.linalg.matrix_norm(error) / torch.linalg.matrix_norm(exact)).max() < largest


@every_method
@pytest.mark.parametrize("chunk", [2, 4, 16, 64])
def test_products_wait_for_each_other(method, chunk):
    cost = method(chunk).cost()
    assert cost.matmuls == cost.depth == chunk - 2


def test_costs_at_64():
    assert forward_substitution(64).cost().macs == sum(i * i for i in range(2, 64))
    assert column_sweep(64).cost().macs == 62 * 64**3


@every_method
def test_every_residual_is_an_operand_of_its_product(method):
    products = [step for step in method(16).steps if isinstance(step, MatMul)]
    assert products
    assert all({*p.add, *p.subtract} <= {p.left, p.right} for p in products)


@every_method
@pytest.mark.parametrize("name", MAX_BETA)
def test_every_tensor_is_proved_and_stays_below_beta(method, name):
    program = method(64)
    seen = arrays_of(program, stress_matrices(name, 2, 64))
    assert all(step.bound == 1.0 for step in program.steps)
    for tensor, values in seen.items():
        assert np.abs(values).max() <= MAX_BETA[name] + 1e-6, tensor


def test_rows_of_the_inverse_appear_one_after_the_other(solved):
    lower = stress_matrices("half_random", 2, 16)
    strict = torch.tril(solved(lower), -1).numpy()
    seen = arrays_of(forward_substitution(16), lower)
    for i in range(2, 16):
        assert np.allclose(seen[f"row_{i}/S"], strict[:, : i + 1], rtol=0, atol=1e-13)


def test_each_column_is_one_factor_more():
    lower = stress_matrices("half_random", 1, 8)[0].double().numpy()
    seen = arrays_of(column_sweep(8), torch.from_numpy(lower))
    product = np.eye(8)
    for j in range(7):
        factor = np.eye(8)
        factor[:, j] -= lower[:, j]
        product = factor @ product
        if j:
            assert np.allclose(seen[f"column_{j}/S"][0] + np.eye(8), product, rtol=0, atol=1e-13)
