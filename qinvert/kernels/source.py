"""Triton source of single tiles; every variable is ``[NB, 16, 16]``, one tile of NB matrices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from qinvert.kernels.tiles import TILE, Position, TileOps
from qinvert.program.sparsity import Support

#: Integers up to this magnitude are exact in float16.
FLOAT16_EXACT: Final = 2**11
#: A tile of zeros.
ZEROS: Final = "tl.zeros((NB, 16, 16), tl.float32)"
#: Positions of a tile's diagonal.
DIAGONAL: Final = "row == column"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Names of the variables that hold one tile."""

    #: float32 values of every plane.
    values: tuple[str, ...]
    #: The same planes as operands of a product.
    operands: tuple[str, ...]
    #: Comes from memory, in other registers than a product's result, and loses nothing as an operand.
    loaded: bool = False


@dataclass(slots=True)
class Source:
    """Statements of a kernel under construction."""

    #: Statements, ``v7 = expression`` or a call, in order.
    lines: list[str] = field(default_factory=list)
    #: float32 scalars that the kernel takes.
    scalars: list[float] = field(default_factory=list)
    _shared: dict[str, str] = field(default_factory=dict)
    _count: int = 0

    def assign(self, expression: str) -> str:
        """Append ``v = expression`` and return ``v``."""
        name = f"v{self._count}"
        self._count += 1
        self.lines.append(f"{name} = {expression}")
        return name

    def once(self, expression: str) -> str:
        """`assign`, or the variable that holds the same expression already."""
        if expression not in self._shared:
            self._shared[expression] = self.assign(expression)
        return self._shared[expression]

    def scalar(self, value: float) -> str:
        """Return the kernel argument of a value: plans of one structure share a kernel.

        Equal values share an argument, and with it a register.
        """
        if value not in self.scalars:
            self.scalars.append(value)
        return f"s{self.scalars.index(value)}"


class TritonOps(TileOps[Tile]):
    """Loading, masking and multiplying, shared by float and integer kernels."""

    #: Triton type of a product's operands.
    operand = "tl.float16"
    #: Further arguments of ``tl.dot``.
    dot_options = ""

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    @abstractmethod
    def fusable(self) -> bool:
        """Whether a product may join a sum without a rounding of its own."""

    @abstractmethod
    def real(self, value: Tile) -> str:
        """Return the float32 value of a tile of the program's output."""

    def raw(self, position: Position) -> str:
        """Return ``M = -L`` of one tile in float32, zero on and above the diagonal."""
        i, j = position
        place = f"L + base + (row + {i * TILE}) * STRIDE + column + {j * TILE}"
        value = self.source.assign(f"-load_tile({place}, {inside(self.source, i)}, FULL)")
        return self.source.assign(f"tl.where(row > column, {value}, 0.0)") if i == j else value

    def where(self, name: str, keep: Support, support: Support) -> str:
        """Return the variable, cleared where ``keep`` is false."""
        mask = self.source.once(pattern(keep, support, self.source))
        return self.source.assign(f"tl.where({mask}, {name}, 0.0)")

    def chain(self, products: Iterable[Sequence[str]], start: str | None) -> str:
        """Return ``start + sum(left @ right)`` in float32."""
        total = start
        for left, right in products:
            accumulator = "" if total is None else f", {total}"
            total = self.source.assign(
                f"tl.dot({left}, {right}{accumulator}{self.dot_options}, out_dtype=tl.float32)"
            )
        return total or self.source.once(ZEROS)

    def total(self, terms: Sequence[str]) -> str | None:
        """Return the float32 sum of ``terms``, None if there are none."""
        total = None
        for term in terms:
            total = term if total is None else self.source.assign(f"{total} + {term}")
        return total


def inside(source: Source, i: int) -> str:
    """Return the mask of the rows of tile row ``i`` that exist."""
    return source.once(f"live & (row + {i * TILE} < rows)")


def pattern(keep: Support, support: Support, source: Source) -> str:
    """Return a Triton expression that is true on ``keep`` and false on the rest of ``support``.

    The masks of block merges are intervals of ``row ^ column``; any other
    pattern becomes 16 bits a row.
    """
    distance = np.bitwise_xor.outer(np.arange(TILE), np.arange(TILE))
    wanted, unwanted = distance[keep], distance[support & ~keep]
    low, high = int(wanted.min()), int(wanted.max())
    if not ((unwanted >= low) & (unwanted <= high)).any():
        return f"((row ^ column) >= {low}) & ((row ^ column) <= {high})"
    bits = source.once("row * 0")
    for i, line in enumerate(keep):
        if line.any():
            number = int(sum(1 << j for j in np.flatnonzero(line)))
            bits = source.once(f"tl.where(row == {i}, {number}, {bits})")
    return f"(({bits} >> column) & 1) != 0"
