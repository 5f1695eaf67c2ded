"""The exact inverse on a band, continued by powers of what it leaves behind."""

from __future__ import annotations

import math

from qinvert.checks import check_integer
from qinvert.errors import ProgramError
from qinvert.methods._blocks import PROVED
from qinvert.methods._builder import Builder
from qinvert.methods._method import Method
from qinvert.program.program import Program
from qinvert.program.steps import Constant, check_chunk

#: Largest float16: the default order keeps the worst sum of powers below it.
LARGEST_HALF = 65504


def banded_residual(chunk: int, order: int | None = None, steps: int | None = None) -> Program:
    """``T = T0 (I + E + ... + E^(steps - 1))``, ``T0 = band(I + M + ... + M^order)``, ``E = I - (I - M) T0``.

    The band keeps the main diagonal and ``order`` diagonals below it.  On
    the band ``T0 = I + S0`` is the exact inverse.  It is built inside the band, by
    Horner's rule with ``B = band(M)``, ``order - 1`` times:

        S0 <- band(B S0 + B).

    ``E = M S0 + M - S0`` vanishes inside the band.  Its powers are summed by
    doubling, with ``R(n) = E + ... + E^(n - 1)``, along the bits of ``steps``:

        R(2n) = R(n) + E^n + R(n) E^n,    R(2n + 1) = E + E R(2n),
        S = S0 + R(steps) + S0 R(steps).

    The result is exact for ``i - j < steps (order + 1)``, and so for the whole
    chunk if ``steps (order + 1) >= chunk``.

    Cost: ``order + 1`` dense products, and two for each doubling except the
    first; 8 at C = 64 with order 3 and 8 steps.
    Range: for unit keys ``|S0|, |E| <= beta_i``.  S0 is a part of the inverse;
    for ``i - j > order``, ``E[i, j] = sum_k M[i, k] T0[k, j]`` over rows k of
    the band is an entry of the half-product Y of `block_merge`, split after
    row ``j + order``.  Powers of E have no such bound.
    Stability: the band bounds the first approximation for every input.  The
    powers of E grow more slowly than those of M, but they also grow.

    Parameters
    ----------
    chunk : int
        Size C, a power of two.
    order : int, optional
        Diagonals of the band below the main one, 1 to ``chunk - 1``.  By
        default the largest up to ``chunk / 2`` with ``binomial(chunk, order)
        <= 65504``: 3 at C = 64.
    steps : int, optional
        Terms of the sum, 1 to ``chunk``.  By default the smallest power of
        two from 2 that makes at least half of the diagonals exact: 8 at
        C = 64; 1 where the band is the whole triangle.

    Raises
    ------
    ProgramError
        If an argument is out of range.

    References
    ----------
    arXiv 2606.06034, the series with structural mask and parallel residual
    correction.  Its settings are order 3 and 8 steps at C = 64 (as here),
    order 4 and 3 steps at C = 32 (here 4 steps, exact on more diagonals).
    """
    check_chunk(chunk)
    order = _default_order(chunk) if order is None else order
    check_integer("order", order, 1, chunk - 1, ProgramError, "; chunk - 1 is exact without residual steps")
    steps = _default_steps(chunk, order) if steps is None else steps
    check_integer("steps", steps, 1, chunk, ProgramError, "; chunk / (order + 1) are enough to be exact")
    builder = Builder(chunk)
    band = _invert_band(builder, chunk, order)
    total = band
    if steps > 1:
        residual = builder.matmul(
            "residual/E", builder.matrix, band, add=(builder.matrix,), subtract=(band,), bound=PROVED
        )
        sums = _sum_powers(builder, residual, steps)
        bound = PROVED if steps * (order + 1) >= chunk else None
        total = builder.matmul("S", band, sums, add=(band, sums), bound=bound)
    return builder.program("banded_residual", {"order": order, "steps": steps}, total)


def _default_order(chunk: int) -> int:
    legal = (n for n in range(1, chunk // 2 + 1) if math.comb(chunk, n) <= LARGEST_HALF)
    return max(legal, default=1)


def _default_steps(chunk: int, order: int) -> int:
    steps = 1 if order + 1 >= chunk else 2
    while 2 * steps * (order + 1) < chunk:
        steps *= 2
    return steps


def _invert_band(builder: Builder, chunk: int, order: int) -> str:
    band = _band_mask(chunk, order)
    lower = total = builder.mask("band/M", builder.matrix, band, bound=PROVED)
    for k in range(2, order + 1):
        wide = builder.matmul(f"band/product_{k}", lower, total, add=(lower,))
        total = builder.mask(
            "band/S" if k == order else f"band/sum_{k}", wide, band, bound=PROVED if k == order else None
        )
    return total


def _sum_powers(builder: Builder, residual: str, steps: int) -> str:
    """Append ``E + ... + E^(steps - 1)`` for ``steps >= 2`` and return its name."""
    power, total, n = residual, "", 1
    for i in range(steps.bit_length() - 2, -1, -1):
        total = _doubled(builder, total, power, 2 * n)
        if i:
            power = builder.matmul(f"residual/power_{2 * n}", power, power)
        n *= 2
        if steps >> i & 1:
            total = builder.matmul(f"residual/sum_{n + 1}", residual, total, add=(residual,))
            if i:
                power = builder.matmul(f"residual/power_{n + 1}", residual, power)
            n += 1
    return total


def _doubled(builder: Builder, total: str, power: str, n: int) -> str:
    # The sum of one term is empty, and so the sum of two is E itself.
    if not total:
        return power
    return builder.matmul(f"residual/sum_{n}", total, power, add=(total, power))


def _band_mask(chunk: int, order: int) -> Constant:
    """Return 1 on ``order`` diagonals below the main one, and on the main one."""
    ones = tuple((max(0, i - order), i + 1) for i in range(chunk))
    return Constant(name=f"band_mask_{order}", rows=chunk, columns=chunk, ones=ones)


def _candidates(chunk: int) -> tuple[Program, ...]:
    # At least half of the steps of an exact result: with fewer, most diagonals have only the band.
    orders = [order for order in (1, 3, 7) if order < chunk]
    return tuple(
        banded_residual(chunk, order, steps)
        for order in orders
        for steps in sorted({max(1, chunk // (order + 1) // 2), chunk // (order + 1)})
    )


METHOD = Method(
    name="banded_residual",
    build=banded_residual,
    candidates=_candidates,
    automatic=lambda chunk: (banded_residual(chunk),) if chunk > 2 else (),
    rank=2,
    automatic_rank=3,
)
