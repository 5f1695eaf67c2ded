from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinvert.errors import ProgramError
from qinvert.methods import banded_residual
from qinvert.program.steps import MatMul
from qinvert.stress import MAX_BETA, stress_matrices, unit_keys

SETTINGS = [(16, 1, 1), (16, 3, 1), (16, 3, 2), (16, 2, 3), (32, 4, 3), (32, 1, 7), (64, 3, 8), (64, 7, 5)]


def tensors_of(program, lower, dtype=torch.float64) -> dict[str, torch.Tensor]:
    seen = {}
    program.run(lower, dtype=dtype, observe=seen.__setitem__)
    return seen


def arrays_of(program, lower) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors_of(program, lower).items()}


def distance(chunk: int) -> torch.Tensor:
    return torch.arange(chunk).unsqueeze(1) - torch.arange(chunk)


def powers(lower: torch.Tensor, count: int) -> list[np.ndarray]:
    return [np.linalg.matrix_power(-lower.double().numpy(), k) for k in range(count)]


@pytest.mark.parametrize(("chunk", "order", "steps"), SETTINGS)
@pytest.mark.parametrize("name", ["negative_eigenvalues", "half_random"])
def test_it_is_exact_up_to_the_last_diagonal_it_promises_and_not_beyond(chunk, order, steps, name, solved):
    lower = stress_matrices(name, 2, chunk)
    error = (banded_residual(chunk, order, steps).run(lower, dtype=torch.float64) - solved(lower)).abs()
    exact = distance(chunk) < steps * (order + 1)
    assert error[:, exact].max() < 1e-12
    assert error[:, distance(chunk) == steps * (order + 1)].max() > 1e-8


@pytest.mark.parametrize(("order", "steps"), [(1, 32), (3, 16), (4, 13), (7, 8), (20, 4), (63, 1), (3, 64)])
@pytest.mark.parametrize("name", ["small_random", "correlated_keys", "filled_blocks"])
def test_enough_steps_give_the_float64_inverse(order, steps, name, solved):
    lower = stress_matrices(name, 2, 64)
    if order > 7:  # the Horner sums of a wide band are as large as powers of M
        lower = lower / 8
    result = banded_residual(64, order, steps).run(lower, dtype=torch.float64)
    assert torch.allclose(result, solved(lower), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("chunk", "order", "steps"), SETTINGS)
def test_tensors_are_the_band_the_residual_and_its_powers(chunk, order, steps):
    lower = stress_matrices("half_random", 2, chunk)
    seen = arrays_of(banded_residual(chunk, order, steps), lower)
    in_band = (distance(chunk) <= order).numpy()
    band = np.where(in_band, sum(powers(lower, order + 1)), 0)
    eye = np.eye(chunk)
    assert np.allclose(seen["band/S" if order > 1 else "band/M"] + eye, band, rtol=0, atol=1e-12)
    if steps == 1:
        return
    residual = eye - (eye + lower.double().numpy()) @ band
    assert np.allclose(seen["residual/E"], residual, rtol=0, atol=1e-12)
    assert not np.where(in_band, residual, 0).round(12).any()
    for name, tensor in seen.items():
        kind, _, number = name.removeprefix("residual/").partition("_")
        if kind in ("power", "sum"):
            terms = [np.linalg.matrix_power(residual, n) for n in range(1, int(number) + 1)]
            expected = terms[-1] if kind == "power" else sum(terms[:-1])
            assert np.allclose(tensor, expected, rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("steps", range(1, 40))
def test_every_number_of_steps_sums_that_many_terms(steps):
    # With one diagonal in the band E^s reaches diagonal 2 s: the last term is seen at its own diagonal.
    lower = 0.5 * stress_matrices("small_random", 1, 128).double()
    band = np.eye(128) + arrays_of(banded_residual(128, 1, steps), lower)["band/M"][0]
    residual = np.eye(128) - (np.eye(128) + lower[0].numpy()) @ band
    expected = band @ sum(np.linalg.matrix_power(residual, s) for s in range(steps))
    result = banded_residual(128, 1, steps).run(lower[0], dtype=torch.float64)
    assert np.allclose(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("order", "steps", "products"),
    [(3, 8, 8), (3, 16, 10), (3, 1, 2), (3, 2, 4), (3, 3, 5), (1, 4, 4), (7, 8, 12), (3, 5, 7)],
)
def test_products_at_64(order, steps, products):
    cost = banded_residual(64, order, steps).cost()
    assert (cost.matmuls, cost.macs) == (products, products * 64**3)


@pytest.mark.parametrize(
    ("chunk", "order", "steps"),
    [(2, 1, 1), (4, 2, 2), (8, 4, 2), (16, 8, 2), (32, 4, 4), (64, 3, 8), (128, 2, 32), (256, 2, 64)],
)
def test_defaults_keep_the_series_in_float16_and_half_of_the_diagonals_exact(chunk, order, steps):
    assert banded_residual(chunk).parameters == {"order": order, "steps": steps}
    assert math.comb(chunk, order) <= 65504
    assert order == chunk // 2 or math.comb(chunk, order + 1) > 65504
    assert steps * (order + 1) >= chunk / 2


def test_published_settings_are_legal():
    assert banded_residual(64).parameters == {"order": 3, "steps": 8}
    assert banded_residual(32, 4, 3).cost().matmuls == 6


def test_every_residual_is_an_operand_of_its_product():
    for steps in (1, 2, 7, 8, 13):
        program = banded_residual(64, 3, steps)
        products = [step for step in program.steps if isinstance(step, MatMul)]
        assert all({*p.add, *p.subtract} <= {p.left, p.right} for p in products)


@pytest.mark.parametrize(
    ("order", "steps", "proved"), [(3, 16, True), (3, 15, False), (6, 10, True), (6, 9, False)]
)
def test_the_result_has_a_bound_only_where_it_is_the_inverse(order, steps, proved):
    program = banded_residual(64, order, steps)
    bounds = {step.output: step.bound for step in program.steps}
    assert bounds[program.inverse_ports.result] == (1.0 if proved else None)
    assert bounds["band/S"] == bounds["residual/E"] == bounds["band/M"] == 1.0
    assert all(b is None for n, b in bounds.items() if "power" in n or "sum" in n or "product" in n)


@given(
    seed=st.integers(0, 2**32 - 1),
    cosine=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    largest=st.sampled_from([0.3, 1.0, 2.0]),
    decay=st.sampled_from([0.0, 0.02, 1.0]),
    order=st.integers(1, 31),
)
def test_proved_tensors_stay_below_beta_row_by_row_for_unit_keys(seed, cosine, largest, decay, order):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.nn.functional.normalize(unit_keys(1, 32, cosine, generator).double(), dim=-1)
    beta = largest * torch.rand(32, 1, generator=generator, dtype=torch.float64)
    total = torch.cumsum(-decay * torch.rand(32, generator=generator, dtype=torch.float64), 0)
    gap = torch.tril(total.unsqueeze(1) - total)
    lower = torch.tril(beta * (keys @ keys.mT) * torch.exp(gap), -1)
    program = banded_residual(32, order, 32)
    seen = tensors_of(program, lower)
    for step in program.steps:
        # The Horner sums of a wide band are large, and so are their rounding errors.
        if step.bound is not None and (order <= 8 or "band/M" in step.output):
            assert (seen[step.output].abs() <= beta + 1e-6).all(), step.output


@pytest.mark.parametrize("name", MAX_BETA)
def test_proved_tensors_stay_below_beta_on_every_stress_set(name):
    program = banded_residual(64)
    seen = tensors_of(program, stress_matrices(name, 4, 64))
    for step in program.steps:
        if step.bound is not None:
            assert seen[step.output].abs().max() <= MAX_BETA[name] + 1e-6, step.output


def test_powers_of_the_residual_and_horner_sums_do_exceed_beta():
    seen = tensors_of(banded_residual(64, 7, 8), stress_matrices("repeated_keys", 1, 64))
    assert seen["band/sum_4"].abs().max() > 2 * MAX_BETA["repeated_keys"]
    seen = tensors_of(banded_residual(64, 1, 32), stress_matrices("negative_eigenvalues", 8, 64))
    assert seen["residual/power_4"].abs().max() > 2 * MAX_BETA["negative_eigenvalues"]


def test_what_overflows_outside_the_band_does_not_reach_it():
    lower = 300.0 * (distance(16) == 3)
    seen = tensors_of(banded_residual(16, 3, 1), lower, torch.float16)
    assert torch.isinf(seen["band/product_2"]).any()
    assert torch.equal(seen["band/S"][0].float(), -lower)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"order": 0}, r"order 0 is not in \[1, 63\]; chunk - 1 is exact"),
        ({"order": 64}, "order 64 is not in"),
        ({"order": 3.0}, r"order 3\.0 is not in"),
        ({"order": True}, "order True is not in"),
        ({"steps": 0}, r"steps 0 is not in \[1, 64\]"),
        ({"steps": 65}, "steps 65 is not in"),
        ({"steps": "8"}, "steps '8' is not in"),
    ],
)
def test_an_illegal_argument_is_named_with_what_is_legal(arguments, words):
    with pytest.raises(ProgramError, match=words):
        banded_residual(64, **arguments)
