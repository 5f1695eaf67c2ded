"""Residual corrections, which any method may append to its result."""

from __future__ import annotations

from qinvert.checks import check_integer
from qinvert.errors import ProgramError
from qinvert.methods._blocks import PROVED
from qinvert.methods._builder import Builder
from qinvert.program.steps import Axis


def check_corrections(corrections: int) -> None:
    """Raise unless 0 to 4 corrections are asked for."""
    check_integer("corrections", corrections, 0, 4, ProgramError, "; 1 is enough for int8")


def correct(builder: Builder, total: str, corrections: int) -> str:
    """Append that many corrections of S, see `qinvert.methods.block_merge`, and return the last S."""
    for k in range(1, corrections + 1):
        total = _correct_once(builder, total, k)
    return total


def correct_factored(builder: Builder, total: str, corrections: int) -> str:
    """As `correct`, of the factored form: corrections of W."""
    for k in range(1, corrections + 1):
        total = _correct_factored_once(builder, total, k)
    return total


def _correct_once(builder: Builder, total: str, k: int) -> str:
    residual = builder.matmul(
        f"correction_{k}/R", builder.matrix, total, add=(builder.matrix,), subtract=(total,)
    )
    update = builder.matmul(f"correction_{k}/update", total, residual, add=(residual,))
    return builder.add(f"correction_{k}/S", total, update, bound=PROVED)


def _correct_factored_once(builder: Builder, total: str, k: int) -> str:
    name = f"correction_{k}"
    rows = builder.scale(f"{name}/S", total, builder.beta, Axis.ROWS, bound=PROVED)
    residual = builder.matmul(f"{name}/R", builder.matrix, rows, add=(builder.matrix,), subtract=(total,))
    columns = builder.scale(f"{name}/V", total, builder.beta, Axis.COLUMNS, bound=PROVED)
    update = builder.matmul(f"{name}/update", columns, residual, add=(residual,))
    return builder.add(f"{name}/W", total, update, bound=PROVED)
