"""One fused kernel from a program: one load of L and one store of T per matrix."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from qinvert.kernels.diagonal_loop import rolled
from qinvert.kernels.float_ops import FloatOps, Precision
from qinvert.kernels.integer_ops import IntegerOps
from qinvert.kernels.source import DIAGONAL, ZEROS, Source, Tile, TritonOps, inside
from qinvert.kernels.template import TEMPLATE
from qinvert.kernels.tile_evaluator import TileEvaluator
from qinvert.kernels.tiles import TILE, Placed, UnsupportedError
from qinvert.methods.block_merge import block_merge
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.program import Program

#: Products of tiles in one kernel; beyond, compiling takes minutes and registers spill.
MAX_PRODUCTS: Final = 700
#: Integer kernels of more statements roll their common work into a loop, and warps go in step, so
#: that they share the instructions that they fetch.
LONG_KERNEL: Final = 600
#: Integer kernels of fewer statements fit 128 registers: 16 warps on a multiprocessor.
SHORT_KERNEL: Final = 450
#: Up to this many scalars stay in registers once loaded; arguments are fetched anew for every use.
LOADED_SCALARS: Final = 12
#: Rows of tiles are joined and stored together up to this chunk; of larger chunks and long kernels
#: each tile is stored as soon as it is complete, to free its registers.
JOINED_CHUNK: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """Source of a kernel with what its launch needs."""

    #: Python source of a module with a function ``kernel``.
    text: str
    #: Values of the scalars, in order.
    scalars: tuple[float, ...]
    #: The kernel loads its scalars from a tensor; else they are arguments.
    loaded: bool
    #: Tensors whose saturated values are counted, in the order of the counters.
    counted: tuple[str, ...]
    #: Size C of the matrices.
    chunk: int
    #: Matrices, and warps, of one program.
    group: int
    #: Registers that a thread may take; None leaves it to the compiler.
    registers: int | None
    #: Products and sums may be fused: only where no rounding between them is part of the result.
    fused: bool


def integer_kernel(plan: QuantizedProgram, count: bool = False) -> Generated:
    """Return the kernel of a plan: the bits of `qinvert.simulation.simulate_inverse`.

    Parameters
    ----------
    plan : QuantizedProgram
    count : bool
        Count the values of every tensor that stand on the ends of its grid, too.

    Raises
    ------
    UnsupportedError
        If the plan has no fused kernel; the message says why.
    """
    source = Source()
    ops = IntegerOps(source, plan)
    counted: list[str] = []

    def tally(name: str, tensor: Placed[Tile]) -> None:
        fmt = plan.tensors[name].format
        ends = [
            f"({v} <= {fmt.minimum}.0) | ({v} >= {fmt.maximum}.0)"
            for v in map(ops.whole, tensor.tiles.values())
        ]
        found = " + ".join(f"({end}).to(tl.int32)" for end in ends)
        source.lines.append(f"count_values(counters + {len(counted)}, {found})")
        counted.append(name)

    result = TileEvaluator(plan.program, ops).run(tally if count else None)
    return _generated(plan.program, source, ops, result, tuple(counted))


@lru_cache(maxsize=64)
def float_kernel(chunk: int, precision: Precision, exact: bool) -> Generated:
    """Return the kernel of a block merge in floating point.

    Ranges start from base 1, so that no intermediate exceeds what the result needs.

    Parameters
    ----------
    chunk : int
        C.
    precision : Precision
    exact : bool
        The input's type loses nothing as an operand of that precision.

    Raises
    ------
    UnsupportedError
        If there is no kernel for that chunk.
    """
    program = block_merge(chunk, base=1, tile=min(TILE, chunk))
    source = Source()
    ops = FloatOps(source, precision, exact)
    return _generated(program, source, ops, TileEvaluator(program, ops).run(), ())


def _generated(
    program: Program, source: Source, ops: TritonOps, result: Placed[Tile], counted: tuple[str, ...]
) -> Generated:
    products = sum("tl.dot(" in line for line in source.lines)
    if products > MAX_PRODUCTS:
        raise UnsupportedError(
            f"{program.title} takes {products} products of tiles; kernels have at most {MAX_PRODUCTS}"
        )
    split = len(source.lines)
    rows = _rows(program, source, ops, result)
    floating = isinstance(ops, FloatOps)
    long = split > LONG_KERNEL and not floating
    joined = program.chunk <= JOINED_CHUNK and not long
    for i, names in enumerate(rows):
        _store(source, i, _joined(source, names) if joined else names)
    body, tail = source.lines[:split], source.lines[split:]
    if long and not counted:
        body = rolled(body, tail, program.chunk // TILE)
    lines = [*body, *tail] if joined else hoisted(body, tail)
    names = [f"s{i}" for i in range(len(source.scalars))]
    loaded = 0 < len(names) <= LOADED_SCALARS
    if loaded:
        lines = [*(f"{name} = tl.load(scalars + {i})" for i, name in enumerate(names)), *lines]
        names = ["scalars"]
    arguments = "".join(f"{name}, " for name in names)
    text = TEMPLATE.replace("<arguments>", arguments) + "".join(f"    {line}\n" for line in lines)
    return Generated(
        text=text,
        scalars=tuple(source.scalars),
        loaded=loaded,
        counted=counted,
        chunk=program.chunk,
        group=4 if long or (split <= SHORT_KERNEL and not floating) else 1,
        registers=_registers(program.chunk, split, floating),
        fused=ops.fusable,
    )


def _registers(chunk: int, statements: int, floating: bool) -> int | None:
    """Return a limit that costs few spills and lets one or four more warps run, if there is one."""
    if floating or statements > LONG_KERNEL:
        return 168 if chunk <= JOINED_CHUNK else None
    return 128 if statements <= SHORT_KERNEL else None


def _rows(program: Program, source: Source, ops: TritonOps, result: Placed[Tile]) -> list[list[str]]:
    """Return the variables that hold T, tile by tile."""
    count = program.chunk // TILE
    rows = []
    for i in range(count):
        names = []
        for j in range(count):
            tile = result.tiles.get((i, j))
            name = source.once(ZEROS) if tile is None else ops.real(tile)
            if i == j and not program.inverse_ports.holds_identity:
                name = source.assign(f"{name} + tl.where({DIAGONAL}, 1.0, 0.0)")
            names.append(name)
        rows.append(names)
    return rows


def _joined(source: Source, names: list[str]) -> list[str]:
    width = TILE
    while len(names) > 1:
        width *= 2
        names = [
            source.assign(f"tl.reshape(tl.permute(tl.join({a}, {b}), (0, 1, 3, 2)), (NB, 16, {width}))")
            for a, b in zip(names[::2], names[1::2], strict=True)
        ]
    return names


def _store(source: Source, i: int, names: list[str]) -> None:
    mask = inside(source, i)
    for j, name in enumerate(names):
        columns = f"tl.arange(0, CHUNK // {len(names)})[None, None, :] + {j * TILE}"
        place = f"T + base + (row + {i * TILE}) * STRIDE + {columns}"
        source.lines.append(f"store_tile({place}, {name}, {mask}, FULL)")


def hoisted(body: list[str], tail: list[str]) -> list[str]:
    """Return ``body`` with every statement of ``tail`` right behind the last one it depends on."""
    places = {line.partition(" = ")[0]: i for i, line in enumerate(body)}
    behind: dict[int, list[str]] = {}
    for line in tail:
        name, _, expression = line.partition(" = ")
        used = re.findall(r"\bv\d+\b", expression or line)
        place = max((places[v] for v in used), default=-1)
        behind.setdefault(place, []).append(line)
        if expression:
            places[name] = place
    merged = list(behind.get(-1, ()))
    for i, line in enumerate(body):
        merged += [line, *behind.get(i, ())]
    return merged
