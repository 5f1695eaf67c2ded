"""The Neumann series by repeated squaring."""

from __future__ import annotations

from qinvert.methods._builder import Builder
from qinvert.methods._method import Method
from qinvert.program.program import Program
from qinvert.program.steps import check_chunk


def neumann_doubling(chunk: int) -> Program:
    """``T = (I + M)(I + M^2)(I + M^4) ... (I + M^(C/2))``, exact in real arithmetic.

    With ``S_1 = M`` and ``I + S_2k = (I + S_k)(I + M^k)``:
    ``S_2k = S_k + M^k + S_k M^k``.

    Cost: ``2 (log2 C - 1)`` dense products, depth ``2 (log2 C - 1)`` at most.
    Range: none is guaranteed; the squares explode like the powers of
    `neumann`, and partial sums are as large as the powers they hold.
    Stability: unstable; the error grows exponentially with C.

    Parameters
    ----------
    chunk : int
        Size C, a power of two.

    Raises
    ------
    ProgramError
        If ``chunk`` is not a power of two.

    References
    ----------
    arXiv 2605.21325, method MCH.
    """
    check_chunk(chunk)
    builder = Builder(chunk)
    power = total = builder.matrix
    k = 1
    while 2 * k < chunk:
        k *= 2
        power = builder.matmul(f"power_{k}", power, power)
        product = builder.matmul(f"sum_{2 * k}/product", total, power)
        partial = builder.add(f"sum_{2 * k}/partial", total, power)
        total = builder.add(f"sum_{2 * k}", partial, product)
    return builder.program("neumann_doubling", {}, total)


METHOD = Method(
    name="neumann_doubling",
    build=neumann_doubling,
    candidates=lambda chunk: (neumann_doubling(chunk),),
    rank=4,
)
