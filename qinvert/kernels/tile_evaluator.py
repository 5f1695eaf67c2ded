"""Evaluates the steps of a program tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qinvert.kernels.tiles import (
    TILE,
    LoadedTiles,
    Placed,
    Position,
    TileOps,
    UnsupportedError,
    V,
    Value,
    frame,
    joined_homes,
    occupied,
    tile_of,
)
from qinvert.program.evaluator import Evaluator
from qinvert.program.sparsity import Support, constant_support, product_support
from qinvert.program.step_list import StepList
from qinvert.program.steps import (
    Add,
    Axis,
    Concat,
    Constant,
    Exponential,
    Mask,
    MatMul,
    Multiply,
    Rescale,
    Scale,
    Slice,
    Step,
    Subtract,
    Transpose,
)

#: ``observe(name, tensor)``, as in `Program.evaluate`.
Observer = Callable[[str, Placed[V]], None]


class TileEvaluator(Evaluator[Value[V]]):
    """Meaning of the steps on tiles, see `qinvert.kernels.tiles`.

    Raises
    ------
    UnsupportedError
        If the program, or one of its steps, cannot be expressed on tiles.
    """

    def __init__(self, program: StepList, ops: TileOps[V]) -> None:
        if program.chunk < TILE:
            raise UnsupportedError(f"matrices of {program.chunk} x {program.chunk} are smaller than a tile")
        if not program.is_inverse:
            raise UnsupportedError("kernels compute inverses, and the program has other ports")
        if program.inverse_ports.factored:
            raise UnsupportedError("the program takes beta")
        self.program = program
        self.chunk = program.chunk
        self.ops = ops

    def run(self, observe: Observer[V] | None = None) -> Placed[V]:
        """Return the program's output for a strictly lower triangular M."""
        support = np.tri(self.chunk, self.chunk, -1, dtype=bool)
        tiles = LoadedTiles(self.ops, occupied(support))
        homes = ((0, 0),)
        source = Placed(rows=self.chunk, columns=self.chunk, homes=homes, support=support, tiles=tiles)

        def see(name: str, value: Value[V]) -> None:
            if observe is not None:
                observe(name, placed(value))

        (result,) = self.program.evaluate(self, {self.program.inverse_ports.matrix: source}, see).values()
        return placed(result)

    def constant(self, constant: Constant, blocks: int) -> Value[V]:
        return constant

    def matmul(
        self,
        step: MatMul,
        left: Value[V],
        right: Value[V],
        add: list[Value[V]],
        subtract: list[Value[V]],
    ) -> Value[V]:
        a, b = placed(left), placed(right)
        homes = self._product_homes(step, a, b)
        added = list(zip(step.add, map(placed, add), strict=True))
        taken = list(zip(step.subtract, map(placed, subtract), strict=True))
        product = product_support(a.support, b.support)
        support = product & frame(self.chunk, homes, a.rows, b.columns)
        for name, term in (*added, *taken):
            _check_homes(step.output, name, homes, term)
            support = support | term.support
        tiles = {}
        for p in occupied(support):
            value = self.ops.matmul(step, p, _pairs(a, b, p), _terms(added, p), _terms(taken, p))
            # Blocks that share a tile also have products outside their homes.
            tiles[p] = self._masked(value, tile_of(support, p), tile_of(product | support, p))
        return Placed(rows=a.rows, columns=b.columns, homes=homes, support=support, tiles=tiles)

    def _product_homes(self, step: MatMul, a: Placed[V], b: Placed[V]) -> tuple[Position, ...]:
        homes = []
        for i, ((row, inner), (other, column)) in enumerate(zip(a.homes, b.homes, strict=True)):
            if inner != other:
                raise UnsupportedError(f"step {step.output!r} multiplies blocks that do not meet")
            rows, columns = a.region(i)[0], b.region(i)[1]
            outside = np.ones(self.chunk, dtype=bool)
            outside[inner : inner + a.columns] = False
            if product_support(a.support[rows, outside], b.support[outside, columns]).any():
                raise UnsupportedError(f"step {step.output!r} would mix the blocks of a tile")
            homes.append((row, column))
        return tuple(homes)

    def add(self, step: Add, left: Value[V], right: Value[V]) -> Value[V]:
        a, b = placed(left), placed(right)
        _check_homes(step.output, step.right, a.homes, b)
        named = [(step.left, a), (step.right, b)]
        support = a.support | b.support
        tiles = {p: self.ops.add(step, _terms(named, p)) for p in occupied(support)}
        return Placed(rows=a.rows, columns=a.columns, homes=a.homes, support=support, tiles=tiles)

    def rescale(self, step: Rescale, source: Value[V]) -> Value[V]:
        a = placed(source)
        tiles = {p: self.ops.rescale(step, value) for p, value in a.tiles.items()}
        return Placed(rows=a.rows, columns=a.columns, homes=a.homes, support=a.support, tiles=tiles)

    def scale(self, step: Scale, source: Value[V], vector: Value[V]) -> Value[V]:
        raise UnsupportedError("the program takes beta")

    def subtract(self, step: Subtract, left: Value[V], right: Value[V]) -> Value[V]:
        raise _unknown(step)

    def multiply(self, step: Multiply, left: Value[V], right: Value[V]) -> Value[V]:
        raise _unknown(step)

    def exponential(self, step: Exponential, source: Value[V]) -> Value[V]:
        raise _unknown(step)

    def transpose(self, step: Transpose, source: Value[V]) -> Value[V]:
        raise _unknown(step)

    def mask(self, step: Mask, source: Value[V], constant: Value[V]) -> Value[V]:
        a = placed(source)
        assert isinstance(constant, Constant)
        keep = np.zeros_like(a.support)
        for i in range(len(a.homes)):
            keep[a.region(i)] = constant_support(constant)
        return self._kept(a, a.support & keep, a.homes, a.rows, a.columns)

    def slice(self, step: Slice, source: Value[V]) -> Value[V]:
        a = placed(source)
        first, last = step.blocks or (0, len(a.homes))
        top, bottom = step.rows or (0, a.rows)
        start, stop = step.columns or (0, a.columns)
        homes = tuple((row + top, column + start) for row, column in a.homes[first:last])
        rows, columns = bottom - top, stop - start
        return self._kept(a, a.support & frame(self.chunk, homes, rows, columns), homes, rows, columns)

    def concat(self, step: Concat, sources: list[Value[V]]) -> Value[V]:
        parts = [source for source in sources if isinstance(source, Placed)]
        if step.axis != Axis.BLOCKS:
            return self._union(step, parts, *joined_homes(step, sources))
        if len(parts) < len(sources):
            raise UnsupportedError(f"step {step.output!r} stacks constants")
        homes = tuple(home for part in parts for home in part.homes)
        return self._union(step, parts, homes, parts[0].rows, parts[0].columns)

    def _union(
        self,
        step: Concat,
        parts: Sequence[Placed[V]],
        homes: tuple[Position, ...],
        rows: int,
        columns: int,
    ) -> Placed[V]:
        support = np.zeros((self.chunk, self.chunk), dtype=bool)
        tiles: dict[Position, V] = {}
        for part in parts:
            if (support & part.support).any():
                raise UnsupportedError(f"step {step.output!r} joins blocks that overlap")
            support = support | part.support
            for position, value in part.tiles.items():
                other = tiles.get(position)
                tiles[position] = value if other is None else self.ops.merge(other, value)
        return Placed(rows=rows, columns=columns, homes=homes, support=support, tiles=tiles)

    def _kept(
        self, a: Placed[V], support: Support, homes: tuple[Position, ...], rows: int, columns: int
    ) -> Placed[V]:
        tiles = {
            p: self._masked(a.tiles[p], tile_of(support, p), tile_of(a.support, p)) for p in occupied(support)
        }
        return Placed(rows=rows, columns=columns, homes=homes, support=support, tiles=tiles)

    def _masked(self, value: V, keep: Support, support: Support) -> V:
        return self.ops.mask(value, keep, support) if (support & ~keep).any() else value


def placed(value: Value[V]) -> Placed[V]:
    """Return a value that is not a constant.

    Raises
    ------
    UnsupportedError
        If it is one: tiles hold constants only in masks and concats.
    """
    if isinstance(value, Constant):
        raise UnsupportedError(f"the program multiplies or adds the constant {value.name!r}")
    return value


def _unknown(step: Step) -> UnsupportedError:
    return UnsupportedError(f"step {step.output!r} is of a kind that tiles do not have")


def _pairs(a: Placed[V], b: Placed[V], position: Position) -> dict[int, tuple[V, V]]:
    i, j = position
    return {
        k: (a.tiles[i, k], b.tiles[k, j])
        for k in range(a.support.shape[0] // TILE)
        if (i, k) in a.tiles
        and (k, j) in b.tiles
        and product_support(tile_of(a.support, (i, k)), tile_of(b.support, (k, j))).any()
    }


def _terms(named: Sequence[tuple[str, Placed[V]]], position: Position) -> list[tuple[str, V]]:
    return [(name, term.tiles[position]) for name, term in named if position in term.tiles]


def _check_homes(output: str, name: str, homes: tuple[Position, ...], term: Placed[V]) -> None:
    if term.homes != homes:
        raise UnsupportedError(f"step {output!r} adds {name!r}, whose blocks are at other places")
