"""The factored form of `qinvert.methods.block_merge`; the documentation there says what it computes."""

from __future__ import annotations

from qinvert.methods._blocks import PROVED, Layout, diagonal_mask, merge_mask
from qinvert.methods._builder import Builder
from qinvert.methods._corrections import correct_factored
from qinvert.program.program import Program
from qinvert.program.steps import Axis


def factored_merge(chunk: int, base: int, corrections: int) -> Program:
    """Return ``W`` of ``T = I + B W`` from ``K``, by masks from blocks of size 2."""
    builder = Builder(chunk, factored=True)
    total, size = builder.matrix, 2
    if size < chunk:
        total = builder.mask("base_2/W", builder.matrix, diagonal_mask(chunk, size), bound=PROVED)
    while size < chunk:
        name = f"merge_{2 * size}"
        masked = builder.mask(f"{name}/K21", builder.matrix, merge_mask(chunk, size), bound=PROVED)
        rows = builder.scale(f"{name}/S", total, builder.beta, Axis.ROWS, bound=PROVED)
        half_product = builder.matmul(f"{name}/Y", masked, rows, add=(masked,), bound=PROVED)
        columns = builder.scale(f"{name}/V", total, builder.beta, Axis.COLUMNS, bound=PROVED)
        # W is not an operand of V Y.  A separate step adds it, so that every term can stay an integer.
        corner = builder.matmul(f"{name}/W21", columns, half_product, add=(half_product,), bound=PROVED)
        total = builder.add(f"{name}/W", total, corner, bound=PROVED)
        size *= 2
    total = correct_factored(builder, total, corrections)
    parameters: dict[str, int | str] = {"base": base, "layout": Layout.MASKED}
    if corrections:
        parameters["corrections"] = corrections
    return builder.program("block_merge", parameters | {"factored": True}, total)
