"""Newton's iteration for the inverse, from a multiple of the identity."""

from __future__ import annotations

from qinvert.checks import check_integer
from qinvert.errors import ProgramError
from qinvert.methods._builder import Builder
from qinvert.methods._method import Method
from qinvert.numerics.scales import float32
from qinvert.program.program import Program
from qinvert.program.steps import check_chunk

#: More iterations change nothing at any legal chunk size.
MAX_ITERATIONS = 64


def newton_schulz(chunk: int, iterations: int | None = None) -> Program:
    """``X <- X (2I - A X)`` from ``X = I / 2C``, with ``A = I - M``.

    The diagonal of X is a known number: with ``X = d I + S``,

        W = M S + d M - S,              so that 2I - A X = (2 - d) I + W,
        S <- S W + d W + (2 - d) S,     d <- d (2 - d).

    S starts from 0, so the first iteration is ``S = d^2 M``.  Each d is
    rounded to float32, which the next iteration corrects like any other
    error.  The result takes 1 for the last d.

    After k iterations ``I - A X = (I - A / 2C)^(2^k)``, about ``exp(-2^k A / 2C)``.
    For unit keys and ``beta <= 1`` the symmetric part of A, balanced by
    sqrt(beta), is at least I / 2, so the error is about ``exp(-2^k / 4C)``:
    1e-7 for the default at C = 64, and its square after one more iteration.

    Cost: 2 dense products per iteration, except for the first, which has none.
    Range: none is proved.  No power of M is ever formed alone, and S and W
    stay near the larger of max|M| and max|T| on every stress set.
    Stability: each iteration corrects the rounding errors of those before.

    Parameters
    ----------
    chunk : int
        Size C, a power of two.
    iterations : int, optional
        1 to `MAX_ITERATIONS`; ``max(2 log2 C, 12)`` by default.

    Raises
    ------
    ProgramError
        If an argument is out of range.

    References
    ----------
    arXiv 2605.21325, the Newton-Schulz baseline of its published code.
    """
    check_chunk(chunk)
    iterations = max(2 * (chunk.bit_length() - 1), 12) if iterations is None else iterations
    check_integer(
        "iterations", iterations, 1, MAX_ITERATIONS, ProgramError, "; max(2 log2 C, 12) + 1 are exact"
    )
    builder = Builder(chunk)
    diagonal = 1 / (2 * chunk)
    total = builder.rescale("iteration_1/S", builder.matrix, diagonal**2)
    for k in range(2, iterations + 1):
        diagonal = float32(diagonal * (2 - diagonal))
        total = _iterate(builder, total, diagonal, f"iteration_{k}")
    return builder.program("newton_schulz", {"iterations": iterations}, total)


def _iterate(builder: Builder, total: str, diagonal: float, name: str) -> str:
    lower = _times(builder, f"{name}/dM", builder.matrix, diagonal)
    rest = builder.matmul(f"{name}/W", builder.matrix, total, add=(lower,), subtract=(total,))
    update = _times(builder, f"{name}/dW", rest, diagonal)
    kept = _times(builder, f"{name}/kept_S", total, float32(2 - diagonal))
    return builder.matmul(f"{name}/S", total, rest, add=(update, kept))


def _times(builder: Builder, output: str, source: str, factor: float) -> str:
    # Once d is 1 the terms are operands of their products and need no tensor of their own.
    return source if factor == 1 else builder.rescale(output, source, factor)


METHOD = Method(
    name="newton_schulz",
    build=newton_schulz,
    candidates=lambda chunk: (newton_schulz(chunk),),
    rank=5,
)
