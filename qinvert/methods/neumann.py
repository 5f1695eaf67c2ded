"""Truncated Neumann series, one power at a time."""

from __future__ import annotations

from qinvert.checks import check_integer
from qinvert.errors import ProgramError
from qinvert.methods._builder import Builder
from qinvert.methods._method import Method
from qinvert.program.program import Program
from qinvert.program.steps import check_chunk


def neumann(chunk: int, order: int | None = None) -> Program:
    """``T = I + M + M^2 + ... + M^order``.

    Exact for ``order >= chunk - 1``, because M is nilpotent.  Every power is a
    tensor of its own, with its own scale and format.

    Cost: ``order - 1`` dense products, depth ``order - 1``.
    Range: none is guaranteed; ``max|M^k|`` grows like binomial(C, k) in the
    worst case and reaches 1e4 to 1e10 on trained models.
    Stability: truncation drops the powers above ``order``, and where large
    powers cancel, their rounding errors remain.

    Parameters
    ----------
    chunk : int
        Size C, a power of two.
    order : int, optional
        Largest power, 1 to ``chunk - 1``; 15 or less by default.

    Raises
    ------
    ProgramError
        If an argument is out of range.

    References
    ----------
    arXiv 2606.06034, the truncated series before its mask and correction.
    """
    check_chunk(chunk)
    order = min(15, chunk - 1) if order is None else order
    check_integer("order", order, 1, chunk - 1, ProgramError, "; chunk - 1 is exact")
    builder = Builder(chunk)
    power = total = builder.matrix
    for k in range(2, order + 1):
        power = builder.matmul(f"power_{k}", power, builder.matrix)
        total = builder.add(f"sum_{k}", total, power)
    return builder.program("neumann", {"order": order}, total)


METHOD = Method(
    name="neumann",
    build=neumann,
    candidates=lambda chunk: (neumann(chunk),),
    # Only short series: longer ones cost more than exact methods.
    automatic=lambda chunk: tuple(neumann(chunk, order) for order in (1, 2, 3) if order < chunk),
    rank=3,
    automatic_rank=1,
)
