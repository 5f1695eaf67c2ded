"""Blocks stacked on the batch axis, and the merges of one level as two products of them."""

from __future__ import annotations

from qinvert.methods._blocks import PROVED, zeros
from qinvert.methods._builder import Builder
from qinvert.program.steps import Axis, Constant


def bit_reversed(count: int) -> list[int]:
    """Order of a stack of ``count`` blocks in which even blocks come before odd ones.

    The two halves of every merge are then the two halves of the stack, at
    every level.
    """
    if count == 1:
        return [0]
    half = bit_reversed(count // 2)
    return [2 * i for i in half] + [2 * i + 1 for i in half]


def stack_diagonal(builder: Builder, chunk: int, size: int) -> str:
    """Return the diagonal blocks of ``size`` of the input matrix, as one stack."""
    blocks: list[str | Constant] = []
    for i in bit_reversed(chunk // size):
        span = (i * size, (i + 1) * size)
        blocks.append(
            builder.slice(f"base_{size}/M_{i}", builder.matrix, rows=span, columns=span, bound=PROVED)
        )
    return builder.concat(f"base_{size}/M", blocks, Axis.BLOCKS, bound=PROVED)


def merge_packed(builder: Builder, total: str, chunk: int, tile: int) -> str:
    """Append all merges of a stack of inverses of the size ``tile``, and return the whole inverse."""
    while tile < chunk:
        total = _merge_level(builder, total, chunk, tile)
        tile *= 2
    return total


def _merge_level(builder: Builder, total: str, chunk: int, half: int) -> str:
    name = f"merge_{2 * half}"
    merges = chunk // (2 * half)
    lower = _stack_lower(builder, name, merges, half)
    first = builder.slice(f"{name}/S11", total, blocks=(0, merges), bound=PROVED)
    second = builder.slice(f"{name}/S22", total, blocks=(merges, 2 * merges), bound=PROVED)
    half_product = builder.matmul(f"{name}/Y", lower, first, add=(lower,), bound=PROVED)
    corner = builder.matmul(f"{name}/S21", second, half_product, add=(half_product,), bound=PROVED)
    # Rows first, then columns: QNN compiles the other order wrongly.
    left = builder.concat(f"{name}/left", [first, corner], Axis.ROWS, bound=PROVED)
    right = builder.concat(f"{name}/right", [zeros(half), second], Axis.ROWS, bound=PROVED)
    return builder.concat(f"{name}/S", [left, right], Axis.COLUMNS, bound=PROVED)


def _stack_lower(builder: Builder, name: str, merges: int, half: int) -> str:
    blocks: list[str | Constant] = []
    for i in bit_reversed(merges):
        start = 2 * half * i
        blocks.append(
            builder.slice(
                f"{name}/M21_{i}" if merges > 1 else f"{name}/M21",
                builder.matrix,
                rows=(start + half, start + 2 * half),
                columns=(start, start + half),
                bound=PROVED,
            )
        )
    if merges == 1:
        return f"{name}/M21"
    return builder.concat(f"{name}/M21", blocks, Axis.BLOCKS, bound=PROVED)
