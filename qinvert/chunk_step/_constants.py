"""0/1 matrices of the chunk step."""

from __future__ import annotations

from qinvert.program.steps import Constant, Range


def triangle(size: int, *, upper: bool, strict: bool) -> Constant:
    """Return 1 below the diagonal, or above it; on the diagonal, too, unless it is strict."""
    name = f"{'strictly_' if strict else ''}{'upper' if upper else 'lower'}_{size}"
    if upper:
        ones = tuple((i + strict, size) for i in range(size))
    else:
        ones = tuple((0, i + (not strict)) for i in range(size))
    return Constant(name=name, rows=size, columns=size, ones=ones)


def full(rows: int, columns: int) -> Constant:
    """Return a matrix of 1."""
    return Constant(name=f"ones_{rows}x{columns}", rows=rows, columns=columns, ones=((0, columns),) * rows)


def identity(size: int) -> Constant:
    """Return 1 on the diagonal."""
    ones = tuple((i, i + 1) for i in range(size))
    return Constant(name=f"identity_{size}", rows=size, columns=size, ones=ones)


def below_pivots(size: int, half: int, *, transposed: bool) -> Constant:
    """Return 1 where rows of the lower half of each block of ``2 half`` meet columns of its upper half."""

    def span(i: int) -> Range:
        lower, start = bool(i // half % 2), i // half * half
        if transposed:
            return (0, 0) if lower else (start + half, start + 2 * half)
        return (start - half, start) if lower else (0, 0)

    side = "above" if transposed else "below"
    ones = tuple(map(span, range(size)))
    return Constant(name=f"{side}_pivots_{2 * half}", rows=size, columns=size, ones=ones)


def sums_to_pivots(size: int, half: int) -> Constant:
    """Return what adds up log decays between every token and the pivot of its block of ``2 half``.

    The pivot p is the last token of the upper half.  Column i holds 1 in the rows of
    (p, i] for a token behind it, and in those of (i, p] for one before it.
    """

    def span(row: int) -> Range:
        start = row // (2 * half) * 2 * half
        return (row, start + 2 * half) if row >= start + half else (start, row)

    ones = tuple(map(span, range(size)))
    return Constant(name=f"to_pivots_{2 * half}", rows=size, columns=size, ones=ones)
