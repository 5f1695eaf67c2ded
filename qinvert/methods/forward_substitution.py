"""Forward substitution, row after row: the sequential reference."""

from __future__ import annotations

from qinvert.methods._blocks import PROVED
from qinvert.methods._builder import Builder
from qinvert.methods._method import Method
from qinvert.program.program import Program
from qinvert.program.steps import Axis, Constant, check_chunk


def forward_substitution(chunk: int) -> Program:
    """``S[i, :] = M[i, :] + M[i, :i] S[:i, :]``, row after row.

    This is what models and kernels run today, and it is for comparison: every row
    waits for all rows above it, and no product has more than one row.  Only the first i
    columns of row i are not zero, so the product is ``M[i, :i] S[:i, :i]``.

    Cost: ``C - 2`` dependent products of a row by a matrix, ``C^3 / 3``
    multiply-accumulates, five steps per row.
    Range: for unit keys ``|M|, |S| <= beta_i``; every tensor holds only
    rows of these two.
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
    ``torch_chunk_gated_delta_rule`` of Hugging Face transformers.
    """
    check_chunk(chunk)
    builder = Builder(chunk)
    # Rows 0 and 1 of S are those of M, on a scale of their own.
    first = builder.slice("row_1/M", builder.matrix, rows=(0, 2), bound=PROVED)
    total = builder.rescale("row_1/S", first, bound=PROVED)
    for i in range(2, chunk):
        total = _append_row(builder, total, chunk, i)
    return builder.program("forward_substitution", {}, total)


def _append_row(builder: Builder, total: str, chunk: int, i: int) -> str:
    name = f"row_{i}"
    lower = builder.slice(f"{name}/M", builder.matrix, rows=(i, i + 1), columns=(0, i), bound=PROVED)
    above = builder.slice(f"{name}/above", total, columns=(0, i), bound=PROVED)
    product = builder.matmul(f"{name}/product", lower, above, add=(lower,), bound=PROVED)
    zeros = Constant(name=f"zeros_{chunk - i}", rows=1, columns=chunk - i, ones=((0, 0),))
    row = builder.concat(f"{name}/row", [product, zeros], Axis.COLUMNS, bound=PROVED)
    return builder.concat(f"{name}/S", [total, row], Axis.ROWS, bound=PROVED)


METHOD = Method(
    name="forward_substitution",
    build=forward_substitution,
    candidates=lambda chunk: (forward_substitution(chunk),),
    sequential=True,
    rank=1,
)
