"""Input matrices: what is accepted as ``L``, and its exact inverse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

from qinvert.errors import InputError
from qinvert.program.steps import MAX_BETA, MIN_BETA, check_chunk

Array: TypeAlias = npt.NDArray[np.floating]
Matrices: TypeAlias = "torch.Tensor | Array"
M = TypeVar("M", torch.Tensor, Array)

#: Types that L may have.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def as_tensor(matrices: object, name: str = "L") -> torch.Tensor:
    """Return ``matrices`` as a floating tensor, without checking their structure.

    Raises
    ------
    InputError
        If it is not a real numeric array.
    """
    if isinstance(matrices, torch.Tensor):
        tensor = matrices.detach()
    else:
        try:
            array = np.asarray(matrices)
            if array.dtype.kind not in "fiu":
                raise TypeError(f"dtype {array.dtype}")
            # torch takes writeable arrays with positive strides in the machine's byte order.
            plain = array.flags.writeable and all(stride >= 0 for stride in array.strides)
            tensor = torch.as_tensor(array.astype(array.dtype.newbyteorder("="), copy=not plain, order="C"))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{name} is not a real numeric array ({error}); pass a tensor or an array"
            ) from None
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        raise InputError(f"{name} is sparse, nested, quantized or without data; pass a dense tensor")
    if tensor.dtype in FLOATS:
        return tensor
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise InputError(f"{name} has dtype {tensor.dtype}; pass float16, bfloat16, float32 or float64")
    return tensor.to(torch.float32)


def check_matrices(matrices: object, chunk: int | None = None, name: str = "L") -> torch.Tensor:
    """Return ``matrices`` as a tensor ``(..., C, C)`` that is safe to invert.

    Parameters
    ----------
    matrices : tensor or array
        Strictly lower triangular, finite, C a power of two.
    chunk : int, optional
        The C that a plan was made for.
    name : str
        What the messages call the input.

    Raises
    ------
    InputError
        For a wrong shape, NaN or Inf, or a nonzero upper part or diagonal.
    """
    tensor = as_tensor(matrices, name)
    if tensor.ndim < 2 or tensor.shape[-1] != tensor.shape[-2] or tensor.numel() == 0:
        raise InputError(f"{name} has shape {list(tensor.shape)}; pass square matrices (..., C, C)")
    size = tensor.shape[-1]
    if chunk is not None and size != chunk:
        raise InputError(
            f"{name} is {size} x {size}, but the plan is for {chunk} x {chunk}; calibrate at that size"
        )
    try:
        check_chunk(size)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    # The maximum and minimum at every position are enough: NaN passes through both.
    flat = tensor.reshape(-1, size, size)
    ends = torch.stack([flat.amax(0), flat.amin(0)])
    if not bool(torch.isfinite(ends).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"{name} holds {bad} NaN or Inf values; look for them upstream (gates, key norms)")
    if bool(torch.triu(ends).any()):
        raise InputError(
            f"{name} is not strictly lower triangular: its upper part or diagonal is not zero; "
            "pass L of T = (I + L)^-1, for example tril(A, -1)"
        )
    return tensor


def check_beta(beta: object, lower: torch.Tensor, name: str = "beta") -> torch.Tensor:
    """Return ``beta`` as a tensor ``(..., C)`` that goes with checked matrices ``L``.

    Raises
    ------
    InputError
        If ``beta`` does not have one number in [0, 2] for every row of L, or
        if it is 0 for a row of L that is not zero.
    """
    tensor = as_tensor(beta, name).to(lower.device)
    if tensor.shape != lower.shape[:-1]:
        raise InputError(
            f"{name} has shape {list(tensor.shape)}; L {list(lower.shape)} needs one number per row, "
            f"{list(lower.shape[:-1])}"
        )
    # NaN fails every comparison.
    if not bool(((tensor >= 0) & (tensor <= MAX_BETA)).all()):
        raise InputError(f"{name} holds values that are not in [0, {MAX_BETA:g}]; pass what sigmoid returned")
    if bool(lower[tensor == 0].any()):
        raise InputError(f"{name} is 0 where the row of L is not; pass the beta that L was built with")
    return tensor


def row_factors(beta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``max(beta, MIN_BETA)`` ``(..., C, 1)``: rows are divided by it, and multiplied by it at the end."""
    return beta.to(dtype).clamp(min=MIN_BETA).unsqueeze(-1)


def divided(lower: torch.Tensor, beta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``K = -L / max(beta, MIN_BETA)``, row by row: one division in ``dtype``, as in the graph.

    Exact arithmetic has ``(I + L)^-1 = I + beta W`` for every positive beta:
    MIN_BETA limits the range of K and does not cost accuracy.  A row of zeros
    gives zeros.
    """
    return -lower.to(dtype) / row_factors(beta, dtype)


def like(result: torch.Tensor, given: object, *more: object) -> torch.Tensor | Array:
    """Return ``result`` as the kind of container that the caller passed in.

    A tensor that was made of tensors with a gradient refuses to pass one back,
    see `WithoutGradient`; ``more`` are further inputs.
    """
    if not isinstance(given, torch.Tensor):
        return cast("Array", result.cpu().numpy())
    return without_gradient(result, given, *more)


def without_gradient(result: torch.Tensor, *given: object) -> torch.Tensor:
    """Return ``result``, which refuses to pass a gradient back to those of ``given`` that want one."""
    trained = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
    if trained and torch.is_grad_enabled():
        return cast("torch.Tensor", WithoutGradient.apply(result, *trained))  # type: ignore[no-untyped-call]
    return result


class WithoutGradient(torch.autograd.Function):
    """A result that a model runs with, and through which no gradient goes back.

    The gradient of a rounding is zero almost everywhere, and inputs are
    detached when they are checked: without this a model would train as if its
    keys did not reach the inverse.
    """

    @staticmethod
    def forward(_ctx: Any, result: torch.Tensor, *_trained: torch.Tensor) -> torch.Tensor:
        """Return the result."""
        return result.view_as(result)

    @staticmethod
    def backward(_ctx: Any, *_gradients: torch.Tensor) -> Any:
        """Refuse.

        Raises
        ------
        InputError
            Always.
        """
        raise InputError(
            "what this returns has no gradient: train with torch.linalg.solve_triangular, or run it under "
            "torch.no_grad() or on L.detach()"
        )


def exact_inverse(L: M) -> M:  # noqa: N803 - the field's name of this matrix
    """``T = (I + L)^-1`` by a float64 triangular solve.

    Parameters
    ----------
    L : tensor or array, shape ``(..., C, C)``
        Strictly lower triangular.

    Returns
    -------
    tensor or array
        float64: a tensor for a tensor, an array for an array.

    Raises
    ------
    InputError
        See `check_matrices`.
    """
    return cast("M", like(solve(check_matrices(L)), L))


def solve(lower: torch.Tensor) -> torch.Tensor:
    """`exact_inverse` of a checked tensor."""
    eye = torch.eye(lower.shape[-1], dtype=torch.float64, device=lower.device)
    # unitriangular: the diagonal of the system is taken as 1 without being read.
    with _one_thread():
        inverse: torch.Tensor = torch.linalg.solve_triangular(
            lower.to(torch.float64), eye.expand(lower.shape), upper=False, unitriangular=True
        )
    return inverse


class SolvedInverse:
    """``T = (I + L)^-1`` that is never formed: ``T @ b`` solves ``(I + L) x = b`` in L's dtype.

    This is what models do that solve the systems; the result equals theirs bit
    for bit.

    Parameters
    ----------
    lower : torch.Tensor, shape ``(..., C, C)``
        Checked L.
    """

    def __init__(self, lower: torch.Tensor) -> None:
        self.lower = lower

    def __matmul__(self, right: torch.Tensor) -> torch.Tensor:
        with _one_thread():
            solution: torch.Tensor = torch.linalg.solve_triangular(
                self.lower, right, upper=False, unitriangular=True
            )
        return solution


@contextmanager
def _one_thread() -> Iterator[None]:
    # LAPACK splits each small matrix over the threads and waits for all of them.  This gains
    # nothing on an idle machine, and it is hundreds of times slower as soon as one core is busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
