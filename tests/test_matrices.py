from __future__ import annotations

import numpy as np
import pytest
import torch

from qinvert.errors import InputError
from qinvert.matrices import as_tensor, check_matrices, exact_inverse, solve
from qinvert.stress import stress_matrices


def changed(i: int, j: int, value: float) -> torch.Tensor:
    lower = stress_matrices("half_random", 2, 8)
    lower[1, i, j] = value
    return lower


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
@pytest.mark.parametrize(
    ("i", "j", "value", "words"),
    [
        (5, 2, np.nan, "L holds 1 NaN or Inf values; look for them upstream"),
        (5, 2, np.inf, "L holds 1 NaN or Inf values"),
        (5, 2, -np.inf, "L holds 1 NaN or Inf values"),
        (2, 5, np.nan, "L holds 1 NaN or Inf values"),
        (2, 5, 1e-30, r"L is not strictly lower triangular.*tril\(A, -1\)"),
        (0, 7, -1.0, "L is not strictly lower triangular"),
        (3, 3, 1.0, "its upper part or diagonal is not zero"),
        (7, 7, 1e-45, "its upper part or diagonal is not zero"),
    ],
)
def test_one_wrong_value_in_one_matrix_is_found(kind, i, j, value, words):
    lower = changed(i, j, value)
    with pytest.raises(InputError, match=words):
        check_matrices(lower if kind is torch.Tensor else lower.numpy())


@pytest.mark.parametrize(
    "shape", [(), (8,), (8, 4), (4, 8), (2, 8, 4), (0, 0), (0, 8, 8), (2, 0, 8, 8), (3, 0, 0)], ids=str
)
def test_only_square_matrices_are_taken(shape):
    with pytest.raises(InputError, match=r"L has shape \[.*\]; pass square matrices"):
        check_matrices(torch.zeros(shape))


@pytest.mark.parametrize("size", [1, 3, 6, 48, 100, 2048])
def test_the_size_must_be_a_power_of_two_in_reach(size):
    with pytest.raises(InputError, match=f"L: chunk {size} is not a power of two in \\[2, 1024\\]; pad"):
        check_matrices(torch.zeros(1, 1).expand(size, size))


def test_the_size_must_be_the_one_asked_for():
    with pytest.raises(InputError, match="L is 8 x 8, but the plan is for 16 x 16; calibrate at that size"):
        check_matrices(torch.zeros(8, 8), chunk=16)


@pytest.mark.parametrize(
    "given",
    [
        "L",
        [["a", "b"], ["c", "d"]],
        np.array([["0", "0"], ["1", "0"]]),
        np.zeros((4, 4), dtype=object),
        np.zeros((4, 4), dtype=complex),
        np.zeros((4, 4), dtype=bool),
        np.zeros((4, 4), dtype="datetime64[s]"),
        [[0.0, 0.0], [1.0]],
        [[None, None], [None, None]],
        {"L": 1},
        None,
        object(),
    ],
    ids=lambda given: type(given).__name__,
)
def test_what_is_no_real_array_is_refused(given):
    with pytest.raises(InputError, match=r"L is not a real numeric array \(.*\); pass a tensor or an array"):
        check_matrices(given)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.bool])
def test_tensors_of_another_kind_are_refused(dtype):
    with pytest.raises(InputError, match=f"L has dtype {dtype}; pass float16, bfloat16, float32 or float64"):
        check_matrices(torch.zeros(4, 4, dtype=dtype))


@pytest.mark.parametrize("convert", [lambda t: t.to(torch.float8_e4m3fn), lambda t: t.to_sparse()])
def test_tensors_that_torch_cannot_compute_with_are_refused(convert):
    with pytest.raises(InputError):
        check_matrices(convert(torch.zeros(4, 4)))


def test_a_reversed_view_is_an_array_like_any_other():
    upper = np.triu(np.ones((4, 4)), 1)
    assert check_matrices(upper[::-1, ::-1]).sum() == 6


def test_a_read_only_array_is_taken_without_a_warning():
    lower = np.tril(np.ones((4, 4)), -1)
    lower.flags.writeable = False
    assert check_matrices(lower).sum() == 6


def test_messages_use_the_name_that_is_given():
    with pytest.raises(InputError, match=r"^L of layer 3 has shape"):
        check_matrices(torch.zeros(4), name="L of layer 3")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_keep_their_type(dtype):
    assert check_matrices(torch.zeros(2, 4, 4, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("given", [np.tri(4, k=-1, dtype=np.int64), np.tri(4, k=-1, dtype=np.uint8)])
def test_integers_become_float32(given):
    assert as_tensor(given).dtype == torch.float32
    assert torch.equal(check_matrices(given), torch.tril(torch.ones(4, 4), -1))


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_byte_order_of_an_array_does_not_matter(order):
    given = np.tri(4, k=-1, dtype=f"{order}f4")
    assert torch.equal(check_matrices(given), torch.tril(torch.ones(4, 4), -1))


def test_nested_lists_are_arrays():
    assert exact_inverse([[0, 0], [0.5, 0]]).tolist() == [[1, 0], [-0.5, 1]]


def test_a_negative_zero_above_the_diagonal_is_zero():
    lower = -stress_matrices("half_random", 2, 8)
    assert torch.signbit(lower[0, 0, 7])
    assert check_matrices(lower) is not None


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (1, 2, 1, 2)], ids=str)
@pytest.mark.parametrize("chunk", [2, 8, 64])
def test_the_exact_inverse_is_forward_substitution(leading, chunk, solved):
    count = int(np.prod(leading))
    lower = stress_matrices("half_random", count, chunk).reshape(*leading, chunk, chunk)
    exact = exact_inverse(lower)
    assert exact.dtype == torch.float64
    assert exact.shape == lower.shape
    assert torch.allclose(exact, solved(lower), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_array_gives_a_float64_array(dtype):
    lower = stress_matrices("half_random", 2, 8).numpy().astype(dtype)
    exact = exact_inverse(lower)
    assert isinstance(exact, np.ndarray)
    assert exact.dtype == np.float64
    assert np.allclose((np.eye(8) + lower) @ exact, np.eye(8), rtol=0, atol=1e-13)


def test_the_inverse_is_lower_triangular_with_a_unit_diagonal():
    exact = exact_inverse(stress_matrices("repeated_keys", 2, 32))
    assert not torch.triu(exact, 1).any()
    assert (exact.diagonal(dim1=-2, dim2=-1) == 1).all()


def test_inputs_are_not_changed_and_have_no_gradient():
    lower = stress_matrices("half_random", 2, 8).requires_grad_()
    exact = exact_inverse(lower)
    assert exact.grad_fn.name() == "WithoutGradientBackward"
    assert torch.equal(lower.detach(), stress_matrices("half_random", 2, 8))


def test_the_diagonal_of_a_checked_matrix_is_not_read(solved):
    lower = stress_matrices("half_random", 1, 8)
    assert torch.allclose(solve(lower + 3 * torch.eye(8)), solved(lower), rtol=0, atol=1e-14)
