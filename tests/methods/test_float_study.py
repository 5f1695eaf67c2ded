"""The published float errors of doubling and block merge, on the published matrices and on many others.

Published with arXiv 2605.21325: one matrix a size, triu(0.5 rand) of NumPy's generator with seed 0; the
identity is stored inside every tensor, every product and every sum is rounded by itself.  In that form, on
those matrices, every printed digit comes out again, float32 and float16 (NumPy 2, OpenBLAS on AVX-512).

The second digit is luck, though: on the transposed matrices, as good a sample, doubling gives 252 instead of
183 at n = 128, and the mean over many is about 360.  Our programs keep the identity implicit and round once a
product; their mean errors are 0.92 to 1.20 times those of the published form.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from qinvert.methods import (
    banded_residual,
    block_merge,
    column_sweep,
    elimination,
    forward_substitution,
    neumann_doubling,
    newton_schulz,
)
from qinvert.stress import stress_matrices

SIZES = (16, 32, 64, 128)
TORCH = {np.float32: torch.float32, np.float16: torch.float16}
#: Relative Frobenius errors by method, type and size.
PUBLISHED = {
    ("doubling", np.float32): (8e-8, 1e-6, 7e-4, 183),
    ("merge 1", np.float32): (2.5e-8, 5.5e-8, 8.7e-8, 1.8e-7),
    ("merge 16", np.float32): (8e-8, 9e-8, 1.2e-7, 2.3e-7),
    ("doubling", np.float16): (3e-4, 3.7e-3, 2.8, np.nan),
    ("merge 1", np.float16): (1.3e-4, 2e-4, 3.2e-4, 4.6e-4),
    ("merge 16", np.float16): (3e-4, 3.5e-4, 6e-4, 8.6e-4),
}
OURS = {
    "doubling": neumann_doubling,
    "merge 1": lambda n: block_merge(n, base=1),
    "merge 16": lambda n: block_merge(n, base=16),
}
ROWS = [
    (method, dtype, n, published)
    for (method, dtype), errors in PUBLISHED.items()
    for n, published in zip(SIZES, errors, strict=True)
    if np.isfinite(published)
]

every_row = pytest.mark.parametrize(
    ("method", "dtype", "n", "published"), ROWS, ids=[f"{m}-{d.__name__}-{n}" for m, d, n, _ in ROWS]
)


@cache
def published_matrices() -> dict[tuple[type, int], np.ndarray]:
    """Strictly upper parts; sizes and types are drawn one after the other from one generator."""
    draw = np.random.RandomState(0).rand
    order = [(dtype, n) for dtype in TORCH for n in SIZES]
    return {(dtype, n): np.triu(0.5 * draw(n, n).astype(dtype), 1).astype(dtype) for dtype, n in order}


def doubling(m: np.ndarray, terms: int) -> np.ndarray:
    total, power = np.eye(len(m), dtype=m.dtype) + m, m
    for _ in range(terms.bit_length() - 2):
        power = power @ power
        total = total + total @ power
    return total


def merge(total: np.ndarray, m: np.ndarray, size: int) -> np.ndarray:
    block = np.arange(len(m)) // size
    diagonal = np.equal.outer(block, block)
    left, right = (np.where(diagonal & (block % 2 == parity), total, 0).astype(m.dtype) for parity in (0, 1))
    return (left @ m + np.eye(len(m), dtype=m.dtype)) @ right + left


def explicit(method: str, m: np.ndarray) -> np.ndarray:
    """The published form for a strictly upper M."""
    if method == "doubling":
        return doubling(m, len(m))
    size = 16 if method == "merge 16" else 1
    block = np.arange(len(m)) // size
    total = doubling(np.where(np.equal.outer(block, block), m, 0).astype(m.dtype), max(size, 2))
    if size == 1:
        total = np.eye(len(m), dtype=m.dtype)
    while size < len(m):
        total, size = merge(total, m, size), 2 * size
    return total


def relative_error(inverse, lower) -> float:
    exact = np.linalg.inv(np.eye(len(lower)) + np.asarray(lower, dtype=float))
    return float(np.linalg.norm(np.asarray(inverse, dtype=float) - exact) / np.linalg.norm(exact))


@every_row
def test_the_published_form_on_the_published_matrices(method, dtype, n, published):
    upper = published_matrices()[dtype, n]
    # Printed with one digit, and every processor's BLAS sums in another order; doubling at 128 amplifies
    # every rounding 1e9 times.
    tolerance = 0.6 if published > 100 else 0.4
    assert relative_error(explicit(method, -upper), upper) == pytest.approx(published, rel=tolerance)


@every_row
def test_our_programs_on_the_published_matrices(method, dtype, n, published):
    lower = published_matrices()[dtype, n].T.astype(np.float32)
    result = OURS[method](n).run(lower, dtype=TORCH[dtype])
    assert relative_error(result, lower) == pytest.approx(published, rel=0.8 if n == 128 else 0.4)


@pytest.mark.parametrize("dtype", TORCH, ids=lambda d: d.__name__)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("method", OURS)
def test_one_rounding_a_product_makes_the_errors_of_the_published_form(method, n, dtype):
    count = 48 if dtype == np.float32 else 12
    lower = stress_matrices("half_random", count, n, seed=1).numpy().astype(dtype)
    ours = OURS[method](n).run(lower.astype(np.float32), dtype=TORCH[dtype])
    with np.errstate(all="ignore"):
        theirs = [explicit(method, -m.T).T for m in lower]
    errors = [[relative_error(x, m) for x, m in zip(form, lower, strict=True)] for form in (ours, theirs)]
    if (method, n, dtype) == ("doubling", 128, np.float16):
        assert np.isnan(errors).all()
    else:
        assert 0.75 < np.mean(errors[0]) / np.mean(errors[1]) < 1.35


#: Measured on 48 matrices a size, rounded to the type first, beside the published tables.
MEASURED = {
    (torch.float32, "elimination"): (2.4e-8, 4.5e-8, 8.5e-8, 1.6e-7),
    (torch.float32, "restart"): (2.3e-8, 4.3e-8, 8.3e-8, 1.6e-7),
    (torch.float32, "merge 1"): (2.3e-8, 5.0e-8, 1.1e-7, 2.1e-7),
    (torch.float16, "elimination"): (1.6e-4, 2.5e-4, 4.0e-4, 6.4e-4),
    (torch.float16, "restart"): (1.4e-4, 2.1e-4, 3.3e-4, 5.2e-4),
    (torch.float16, "merge 1"): (1.3e-4, 2.0e-4, 3.0e-4, 4.6e-4),
    (torch.bfloat16, "elimination"): (1.2e-3, 2.0e-3, 3.2e-3, 5.1e-3),
    (torch.bfloat16, "restart"): (1.0e-3, 1.7e-3, 2.6e-3, 4.2e-3),
    (torch.bfloat16, "merge 1"): (1.0e-3, 1.6e-3, 2.4e-3, 3.7e-3),
}
FORMS = {
    "elimination": elimination,
    "restart": lambda n: elimination(n, restart=(n.bit_length() + 1) // 2),
    "merge 1": OURS["merge 1"],
}


@pytest.mark.parametrize(("dtype", "form"), MEASURED)
@pytest.mark.parametrize("i", range(len(SIZES)), ids=SIZES)
def test_elimination_is_as_stable_as_merges(dtype, form, i, solved):
    lower = stress_matrices("half_random", 16, SIZES[i], seed=1).to(dtype).float()
    error = mean_error(FORMS[form](SIZES[i]), lower, solved(lower), dtype)
    # float32 sums products in an order of the processor's own.
    assert error == pytest.approx(MEASURED[dtype, form][i], rel=0.35 if dtype == torch.float32 else 0.15)


#: float16 and bfloat16 errors at n = 128, published for base 16 and base 1.
STRESSED = [
    ("repeated_keys", torch.float16, 0.16, 2.1e-3),
    ("repeated_keys", torch.bfloat16, np.inf, 1.4e-2),
    ("correlated_keys", torch.float16, 0.5, 1.2e-3),
    ("correlated_keys", torch.bfloat16, np.inf, 9.5e-3),
]
every_stress = pytest.mark.parametrize(("name", "dtype", "base_16", "base_1"), STRESSED)


def mean_error(program, lower, exact, dtype) -> float:
    error = program.run(lower, dtype=dtype).double() - exact
    return float((torch.linalg.matrix_norm(error) / torch.linalg.matrix_norm(exact)).mean())


@every_stress
def test_base_16_loses_on_keys_that_repeat_and_base_1_does_not(name, dtype, base_16, base_1, solved):
    lower = stress_matrices(name, 8, 128)
    exact = solved(lower)
    small, large = (mean_error(block_merge(128, base), lower, exact, dtype) for base in (1, 16))
    assert small == pytest.approx(base_1, rel=0.15)
    if np.isfinite(base_16):
        assert large == pytest.approx(base_16, rel=0.5)
    else:
        assert large > 100


@every_stress
@pytest.mark.parametrize(
    "method",
    [
        *(banded_residual, newton_schulz, forward_substitution, column_sweep, elimination),
        lambda n: elimination(n, "right"),
        lambda n: block_merge(n, 1),
    ],
    ids=[
        *("banded_residual", "newton_schulz", "forward_substitution", "column_sweep"),
        *("elimination", "elimination right", "base 1"),
    ],
)
def test_on_repeated_keys_the_stable_methods_leave_only_the_rounding_of_l(
    name, dtype, base_16, base_1, method, solved
):
    lower = stress_matrices(name, 4, 128)
    exact = solved(lower)
    floor = solved(lower.to(dtype).double()) - exact
    floor_error = float((torch.linalg.matrix_norm(floor) / torch.linalg.matrix_norm(exact)).mean())
    assert mean_error(method(128), lower, exact, dtype) == pytest.approx(floor_error, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_independent_keys_separate_nothing(dtype, solved):
    lower = stress_matrices("independent_keys", 8, 128)
    exact = solved(lower)
    merges = (block_merge(128, 16), block_merge(128, 1))
    programs = (neumann_doubling(128), *merges, newton_schulz(128), elimination(128))
    errors = [mean_error(program, lower, exact, dtype) for program in programs]
    assert max(errors) < 1.5 * min(errors)
