"""Programs on a grid of 16 x 16 tiles.

A matrix unit multiplies tiles of 16 x 16.  Every tensor of a program is laid
out where its blocks are in the C x C matrix, and cut into such tiles: slices and
concatenations become bookkeeping, a tile that is known to be zero is neither
computed nor read, and small blocks share the tiles of the diagonal.
`TileEvaluator` drives the steps of a `Program` through a `TileOps`, which says
what happens to one tile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar

import numpy as np

from qinvert.errors import ProgramError
from qinvert.program.sparsity import Support
from qinvert.program.steps import Add, Axis, Concat, Constant, MatMul, Rescale

#: Edge of a tile, the smallest product of a matrix unit.
TILE: Final = 16

V = TypeVar("V")
#: Row and column of a tile in the grid, or of an element in the matrix.
Position: TypeAlias = tuple[int, int]


class UnsupportedError(ProgramError):
    """The program or plan has no fused kernel; the message says why."""


class TileOps(ABC, Generic[V]):
    """What one step does to one tile of every matrix of a batch."""

    @abstractmethod
    def load(self, position: Position) -> V:
        """Return the tile of M."""

    @abstractmethod
    def mask(self, value: V, keep: Support, support: Support) -> V:
        """Return ``value``, zero outside ``support``, cleared where ``keep`` is false."""

    @abstractmethod
    def merge(self, left: V, right: V) -> V:
        """Return the sum of two tiles; at every element at least one of them is zero."""

    @abstractmethod
    def matmul(
        self,
        step: MatMul,
        position: Position,
        pairs: Mapping[int, tuple[V, V]],
        add: Sequence[tuple[str, V]],
        subtract: Sequence[tuple[str, V]],
    ) -> V:
        """Return ``sum(left @ right) + sum(add) - sum(subtract)``, rounded as ``step.output``.

        ``pairs[k]`` are the tiles ``(i, k)`` and ``(k, j)`` of a result at ``position = (i, j)``.
        """

    @abstractmethod
    def add(self, step: Add, terms: Sequence[tuple[str, V]]) -> V:
        """Return the sum of one or two tiles, rounded as ``step.output``."""

    @abstractmethod
    def rescale(self, step: Rescale, source: V) -> V:
        """Return ``step.factor * source``, rounded as ``step.output``."""


class LoadedTiles(Mapping[Position, V]):
    """Tiles of M, each loaded when it is first used, so that an unused tile takes no registers."""

    def __init__(self, ops: TileOps[V], positions: Sequence[Position]) -> None:
        self._ops = ops
        self._tiles: dict[Position, V | None] = dict.fromkeys(positions)

    def __getitem__(self, position: Position) -> V:
        value = self._tiles[position]
        if value is None:
            value = self._tiles[position] = self._ops.load(position)
        return value

    def __iter__(self) -> Iterator[Position]:
        return iter(self._tiles)

    def __len__(self) -> int:
        return len(self._tiles)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed(Generic[V]):
    """A tensor of a program at its place in the C x C matrix.

    Invariants: elements outside ``support`` are zero, and a tile is present
    exactly where its support is not empty.
    """

    #: Rows of one block.
    rows: int
    #: Columns of one block.
    columns: int
    #: Top left corner of every block.
    homes: tuple[Position, ...]
    #: Where elements may differ from zero, C x C.
    support: Support
    #: Value of every tile that is not zero.
    tiles: Mapping[Position, V]

    def region(self, i: int) -> tuple[slice, slice]:
        """Rows and columns of the block ``i``."""
        row, column = self.homes[i]
        return slice(row, row + self.rows), slice(column, column + self.columns)

    def frame(self) -> Support:
        """True inside the blocks."""
        return frame(self.support.shape[0], self.homes, self.rows, self.columns)


#: Value of a step; a constant stays a constant until a mask or a concat uses it.
Value: TypeAlias = Placed[V] | Constant


def frame(chunk: int, homes: Sequence[Position], rows: int, columns: int) -> Support:
    """Return True inside blocks of one size at ``homes``."""
    inside = np.zeros((chunk, chunk), dtype=bool)
    for row, column in homes:
        inside[row : row + rows, column : column + columns] = True
    return inside


def tile_of(support: Support, position: Position) -> Support:
    """Return the part of a C x C support that lies in one tile."""
    i, j = position
    return support[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]


def occupied(support: Support) -> list[Position]:
    """Positions of the tiles that are not empty, row by row."""
    count = support.shape[0] // TILE
    grid = [(i, j) for i in range(count) for j in range(count)]
    return [position for position in grid if tile_of(support, position).any()]


def joined_homes(step: Concat, sources: Sequence[Value[V]]) -> tuple[tuple[Position, ...], int, int]:
    """Return homes, rows and columns of blocks joined along rows or columns; constants fit anywhere.

    Raises
    ------
    UnsupportedError
        If the sources are not neighbours in the matrix.
    """
    down = step.axis == Axis.ROWS
    offset, homes = 0, None
    for source in sources:
        if isinstance(source, Placed):
            moved = tuple((r - offset, c) if down else (r, c - offset) for r, c in source.homes)
            if homes not in (None, moved):
                raise UnsupportedError(f"step {step.output!r} joins blocks that are not neighbours")
            homes = moved
        offset += source.rows if down else source.columns
    if homes is None:
        raise UnsupportedError(f"step {step.output!r} joins constants only")
    return homes, offset if down else sources[0].rows, sources[0].columns if down else offset
