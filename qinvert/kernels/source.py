"""Triton source of single tiles; every variable is ``[NB, 16, 16]``, one tile of NB matrices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from qinvert.kernels.statements import Expression, Kind, Operand, Statement, expression, variable
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
    """The variables that hold one tile."""

    #: float32 values of every plane.
    values: tuple[Expression, ...]
    #: The same planes as operands of a product.
    operands: tuple[Expression, ...]
    #: Whether it was loaded, into other registers than a product's result, and is exact as an operand.
    loaded: bool = False


@dataclass(slots=True)
class Source:
    """Statements of a kernel under construction."""

    #: Statements in order.
    statements: list[Statement] = field(default_factory=list)
    #: float32 scalars that the kernel takes.
    scalars: list[float] = field(default_factory=list)
    _shared: dict[Expression, Expression] = field(default_factory=dict)
    _count: int = 0

    def assign(
        self,
        template: str,
        *operands: Operand,
        kind: Kind = Kind.OTHER,
        position: Position | None = None,
    ) -> Expression:
        """Append ``v = expression(template, *operands)`` and return ``v``."""
        value, name = expression(template, *operands), f"v{self._count}"
        self._count += 1
        self.statements.append(Statement(variable=name, expression=value, kind=kind, position=position))
        return variable(name)

    def once(self, template: str, *operands: Operand, kind: Kind = Kind.OTHER) -> Expression:
        """Like `assign`, but return the variable that already holds the same expression, if any."""
        value = expression(template, *operands)
        if value not in self._shared:
            self._shared[value] = self.assign("{}", value, kind=kind)
        return self._shared[value]

    def call(self, template: str, *operands: Operand) -> None:
        """Append a call that does not return anything."""
        self.statements.append(Statement(expression=expression(template, *operands)))

    def scalar(self, value: float) -> str:
        """Return the kernel argument of a value, so that plans of one structure share a kernel.

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
    def real(self, value: Tile) -> Expression:
        """Return the float32 value of a tile of the program's output."""

    def raw(self, position: Position) -> Expression:
        """Return ``M = -L`` of one tile in float32, zero on and above the diagonal."""
        i, j = position
        tile = loaded_tile(i * TILE, j * TILE, inside(self.source, i))
        value = self.source.assign("{}", tile, position=position)
        return self.source.assign("tl.where(row > column, {}, 0.0)", value) if i == j else value

    def where(self, value: Expression, keep: Support, support: Support) -> Expression:
        """Return the variable, cleared where ``keep`` is false."""
        return self.source.assign("tl.where({}, {}, 0.0)", pattern(keep, support, self.source), value)

    def converted(self, value: Expression) -> Expression:
        """Return a value as the operand of a product."""
        return self.source.assign("{}.to({})", value, self.operand, kind=Kind.CONVERSION)

    def chain(self, products: Iterable[Sequence[Expression]], start: Expression | None) -> Expression:
        """Return ``start + sum(left @ right)`` in float32."""
        total = start
        for left, right in products:
            accumulator = "" if total is None else expression(", {}", total)
            total = self.source.assign(
                "tl.dot({}, {}{}{}, out_dtype=tl.float32)",
                *(left, right, accumulator, self.dot_options),
                kind=Kind.PRODUCT,
            )
        return total or self.source.once(ZEROS)

    def total(self, terms: Sequence[Expression]) -> Expression | None:
        """Return the float32 sum of ``terms``, or None if there are none."""
        total = None
        for term in terms:
            total = term if total is None else self.source.assign("{} + {}", total, term)
        return total


def loaded_tile(row: int | str, column: int | str, mask: Expression) -> Expression:
    """Return M at 16 x 16 places from ``row`` and ``column`` on."""
    return expression("-load_tile(L + base + (row + {}) * STRIDE + column + {}, {}, FULL)", row, column, mask)


def existing(row: int | str) -> Expression:
    """Return the mask of the 16 rows from ``row`` on that exist."""
    return expression("live & (row + {} < rows)", row)


def inside(source: Source, i: int) -> Expression:
    """Return the variable that masks the rows of tile row ``i`` that exist."""
    return source.once("{}", existing(i * TILE))


def pattern(keep: Support, support: Support, source: Source) -> Expression:
    """Return a variable that is true on ``keep`` and false on the rest of ``support``.

    The masks of block merges are intervals of ``row ^ column``; any other
    pattern becomes 16 bits per row.
    """
    distance = np.bitwise_xor.outer(np.arange(TILE), np.arange(TILE))
    wanted, unwanted = distance[keep], distance[support & ~keep]
    low, high = int(wanted.min()), int(wanted.max())
    if not ((unwanted >= low) & (unwanted <= high)).any():
        return source.once("((row ^ column) >= {}) & ((row ^ column) <= {})", low, high)
    bits = source.once("row * 0")
    for i, line in enumerate(keep):
        if line.any():
            number = int(sum(1 << j for j in np.flatnonzero(line)))
            bits = source.once("tl.where(row == {}, {}, {})", i, number, bits)
    return source.once("(({} >> column) & 1) != 0", bits)
