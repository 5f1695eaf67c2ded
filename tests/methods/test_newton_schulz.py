from __future__ import annotations

import numpy as np
import pytest
import torch

from qinvert.errors import ProgramError
from qinvert.methods import newton_schulz
from qinvert.program.ports import MATRIX
from qinvert.program.steps import Rescale
from qinvert.stress import STRESS, stress_matrices


def relative_error(program, lower, exact, dtype=torch.float64) -> float:
    error = program.run(lower, dtype=dtype).double() - exact
    return float((torch.linalg.matrix_norm(error) / torch.linalg.matrix_norm(exact)).max())


def ranges_of(program, lower) -> dict[str, float]:
    seen = {}
    program.run(lower, dtype=torch.float64, observe=lambda name, x: seen.update({name: float(x.abs().max())}))
    return seen


@pytest.mark.parametrize("iterations", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("name", ["half_random", "repeated_keys"])
def test_it_is_newtons_iteration_with_the_diagonal_replaced(iterations, name):
    lower = stress_matrices(name, 2, 16)
    a = np.eye(16) + lower.double().numpy()
    x = np.eye(16) / 32
    for _ in range(iterations):
        x = x @ (2 * np.eye(16) - a @ x)
    result = newton_schulz(16, iterations).run(lower, dtype=torch.float64).numpy()
    # Each diagonal is rounded to float32.
    assert np.allclose(np.tril(result, -1), np.tril(x, -1), rtol=0, atol=1e-7 * np.abs(x).max())
    assert np.array_equal(np.diagonal(result, axis1=1, axis2=2), np.ones((2, 16)))


@pytest.mark.parametrize("name", STRESS)
@pytest.mark.parametrize("chunk", [4, 32, 128])
def test_one_iteration_beyond_the_default_is_the_float64_inverse(name, chunk, solved):
    lower = stress_matrices(name, 3, chunk)
    iterations = max(2 * chunk.bit_length() - 2, 12) + 1
    assert relative_error(newton_schulz(chunk, iterations), lower, solved(lower)) < 1e-13


def test_the_default_leaves_what_its_docstring_says_at_64_and_less_elsewhere(solved):
    errors = {}
    for chunk in (32, 64, 128):
        lower = stress_matrices("ones", 1, chunk)
        errors[chunk] = relative_error(newton_schulz(chunk), lower, solved(lower))
    assert 1e-8 < errors[64] < 3e-7
    assert errors[32] < 1e-13
    assert errors[128] < 1e-13


@pytest.mark.parametrize("name", ["repeated_keys", "correlated_keys", "half_random"])
def test_iterations_correct_the_rounding_errors_of_those_before(name, solved):
    lower = stress_matrices(name, 3, 64).half().float()
    assert relative_error(newton_schulz(64), lower, solved(lower), torch.float16) < 3e-3


@pytest.mark.parametrize("name", STRESS)
def test_no_tensor_outgrows_m_and_t_on_any_stress_set(name):
    seen = ranges_of(newton_schulz(64, 16), stress_matrices(name, 4, 64))
    assert max(seen.values()) <= 1.01 * max(seen[MATRIX], seen["iteration_16/S"])


def test_no_range_is_claimed():
    assert all(step.bound is None for step in newton_schulz(64).steps)


@pytest.mark.parametrize(
    ("chunk", "iterations"), [(2, 12), (16, 12), (64, 12), (128, 14), (256, 16), (1024, 20)]
)
def test_default_iterations_and_two_products_for_each_but_the_first(chunk, iterations):
    program = newton_schulz(chunk)
    assert program.parameters == {"iterations": iterations}
    assert program.cost().matmuls == program.cost().depth == 2 * (iterations - 1)


def test_the_first_iteration_is_one_rescale():
    (step,) = newton_schulz(64, 1).steps
    assert step == Rescale(output="iteration_1/S", source=MATRIX, factor=2.0**-14)


def test_terms_with_the_factor_one_have_no_tensor_of_their_own():
    program = newton_schulz(16, 20)
    assert all(step.factor != 1 for step in program.steps if isinstance(step, Rescale))
    last, before = program.steps[-1], program.steps[-2]
    assert (last.add, before.add) == (("iteration_20/W", "iteration_19/S"), (MATRIX,))


@pytest.mark.parametrize("iterations", [0, 65, -1, 12.0, "12", True])
def test_illegal_iterations_are_refused(iterations):
    with pytest.raises(ProgramError, match=r"iterations .* is not in \[1, 64\]; max\(2 log2 C, 12\) \+ 1"):
        newton_schulz(64, iterations)
