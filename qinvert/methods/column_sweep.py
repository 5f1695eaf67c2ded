"""Elementary factors of the inverse, column after column: a sequential reference."""

from __future__ import annotations

from qinvert.methods._blocks import PROVED
from qinvert.methods._builder import Builder
from qinvert.methods._method import Method
from qinvert.program.program import Program
from qinvert.program.steps import Constant, check_chunk


def column_sweep(chunk: int) -> Program:
    """``T = (I + M_(C-2)) ... (I + M_1) (I + M_0)``, where M_j has only column j of M.

    ``I - M = (I - M_0) (I - M_1) ... (I - M_(C-2))``, and ``M_j^2 = 0`` makes
    each factor's inverse ``I + M_j``.  With ``T = I + S``, for j = 1, 2, ...:

        S <- M_j S + M_j + S.

    This method is for comparison: every product is dense and waits for the one
    before.

    Cost: ``C - 2`` dependent dense products.
    Range: for unit keys ``|M|, |S| <= beta_i``.  After column j, the rows
    ``i <= j + 1`` of S are those of the inverse, and the rows below are those of
    the half-product ``M21 T11`` of `block_merge`, split after row j.
    Stability: stable; nothing larger than the inverse is ever rounded.

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
    arXiv 2605.21325, method MCS.
    """
    check_chunk(chunk)
    builder = Builder(chunk)
    total = _column(builder, chunk, 0)
    for j in range(1, chunk - 1):
        column = _column(builder, chunk, j)
        total = builder.matmul(f"column_{j}/S", column, total, add=(column, total), bound=PROVED)
    return builder.program("column_sweep", {}, total)


def _column(builder: Builder, chunk: int, j: int) -> str:
    mask = Constant(name=f"column_mask_{j}", rows=chunk, columns=chunk, ones=((j, j + 1),) * chunk)
    return builder.mask(f"column_{j}/M", builder.matrix, mask, bound=PROVED)


METHOD = Method(
    name="column_sweep",
    build=column_sweep,
    candidates=lambda chunk: (column_sweep(chunk),),
    sequential=True,
    rank=2,
)
