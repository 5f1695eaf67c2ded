"""What merges of blocks share: the bound of their tensors, their layouts, and constants of blocks."""

from __future__ import annotations

from enum import StrEnum

from qinvert.program.steps import Constant

#: |M|, |S| and |Y| of a block merge are at most this multiple of max(beta); |K|, |W| and |Y|
#: of a factored one are at most this number itself.
PROVED = 1.0


class Layout(StrEnum):
    """How the blocks of one merge level are laid out."""

    #: Blocks stacked on the batch axis: the least arithmetic.
    PACKED = "packed"
    #: Dense C x C products of masked matrices: no slicing, for wide matrix units.
    MASKED = "masked"


def zeros(size: int) -> Constant:
    """Return a square block of 0."""
    return Constant(name=f"zeros_{size}", rows=size, columns=size, ones=((0, 0),) * size)


def diagonal_mask(tile: int, size: int) -> Constant:
    """Return 1 inside the diagonal blocks of ``size``."""
    ones = tuple((i // size * size, (i // size + 1) * size) for i in range(tile))
    return Constant(name=f"diagonal_mask_{size}", rows=tile, columns=tile, ones=ones)


def merge_mask(tile: int, half: int) -> Constant:
    """Return 1 where M21 of the merges of two blocks of ``half`` lies."""
    ones = tuple(((i // half - 1) * half, i // half * half) if i // half % 2 else (0, 0) for i in range(tile))
    return Constant(name=f"merge_mask_{2 * half}", rows=tile, columns=tile, ones=ones)
