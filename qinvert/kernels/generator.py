"""One fused kernel from a program: one load of L and one store of T per matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from qinvert.kernels.diagonal_loop import rolled
from qinvert.kernels.float_ops import FloatOps, Precision
from qinvert.kernels.integer_ops import IntegerOps
from qinvert.kernels.source import DIAGONAL, ZEROS, Source, Tile, TritonOps, inside
from qinvert.kernels.statements import Expression, Kind, Statement, expression, rendered, summed
from qinvert.kernels.template import TEMPLATE
from qinvert.kernels.tile_evaluator import TileEvaluator
from qinvert.kernels.tiles import TILE, Placed, UnsupportedError
from qinvert.methods.block_merge import block_merge
from qinvert.methods.elimination import elimination
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.program import Program
from qinvert.program.step_list import StepList

#: Largest number of products of tiles in one kernel: with more, compiling takes minutes and
#: registers spill.
MAX_PRODUCTS: Final = 700
#: Integer kernels of more statements put their common work into a loop, and their warps run in step,
#: so that they share the instructions that they fetch.
LONG_KERNEL: Final = 600
#: Integer kernels of fewer statements fit 128 registers: 16 warps on a multiprocessor.
SHORT_KERNEL: Final = 450
#: Up to this many scalars stay in registers once loaded; arguments are fetched again for every use.
LOADED_SCALARS: Final = 12
#: Rows of tiles are joined and stored together up to this chunk; in larger chunks and long kernels
#: each tile is stored as soon as it is complete, to free its registers.
JOINED_CHUNK: Final = 64
#: From this chunk on, float kernels of one product for each pair of tiles wait for memory.
MEMORY_BOUND_CHUNK: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """Source of a kernel with what its launch needs."""

    #: Python source of a module with a function ``kernel``.
    text: str
    #: Values of the scalars, in order.
    scalars: tuple[float, ...]
    #: Whether the kernel loads its scalars from a tensor; otherwise they are arguments.
    loaded: bool
    #: Tensors whose saturated values are counted, in the order of the counters.
    counted: tuple[str, ...]
    #: Size C of the matrices.
    chunk: int
    #: Number of matrices, and of warps, of one Triton program.
    group: int
    #: Registers that a thread may take; None leaves it to the compiler.
    registers: int | None
    #: Whether products and sums may be fused: only if no rounding between them is part of the result.
    fused: bool


def integer_kernel(plan: QuantizedProgram, count: bool = False, interpreted: bool = False) -> Generated:
    """Return the kernel of a plan, with the bits of `qinvert.simulation.simulate_inverse`.

    Parameters
    ----------
    plan : QuantizedProgram
    count : bool
        Also count the values of every tensor that is not partial that are on the ends of its grid.
    interpreted : bool
        For Triton's interpreter, whose fused multiply-adds differ from those of a device: the
        kernel divides instead.

    Raises
    ------
    UnsupportedError
        If the plan has no fused kernel; the message says why.
    """
    source = Source()
    ops = IntegerOps(source, plan, interpreted)
    counted: list[str] = []
    partial = plan.program.partial_tensors

    def tally(name: str, tensor: Placed[Tile]) -> None:
        if name in partial:
            return
        fmt = plan.tensors[name].format
        lowest, highest = float(fmt.minimum), float(fmt.maximum)
        found = [
            expression("(({} <= {}) | ({} >= {})).to(tl.int32)", value, lowest, value, highest)
            for value in map(ops.whole, tensor.tiles.values())
        ]
        source.call("count_values(counters + {}, {})", len(counted), summed(found))
        counted.append(name)

    result = TileEvaluator(plan.program, ops).run(tally if count else None)
    return _generated(plan.program, source, ops, result, tuple(counted))


@lru_cache(maxsize=64)
def float_kernel(chunk: int, precision: Precision, exact: bool) -> Generated:
    """Return the kernel that `qinvert.kernels.solve_tril` runs in floating point.

    Its program is `float_program`.

    Parameters
    ----------
    chunk : int
        C.
    precision : Precision
    exact : bool
        Whether the input's type loses nothing as an operand of that precision.

    Raises
    ------
    UnsupportedError
        If there is no kernel for that chunk.
    """
    return program_kernel(float_program(chunk, precision), precision, exact)


def float_program(chunk: int, precision: Precision) -> Program:
    """Return the fastest program of a precision, on tiles, as `benchmarks/gpu.py` measured it.

    Elimination inside tiles takes 32 products of tiles at C = 64, and a block
    merge 40.  From C = 64 on, kernels with one product of float16 or bfloat16
    operands for each of them wait for memory with both, and the merge rounds
    less: it stays.  Merges start from base 1, so that no intermediate exceeds
    what the result needs; in elimination none ever does.
    """
    tile = min(TILE, chunk)
    if chunk >= MEMORY_BOUND_CHUNK and precision in (Precision.FP16, Precision.BF16):
        return block_merge(chunk, base=1, tile=tile)
    return elimination(chunk, tile=tile)


def program_kernel(program: StepList, precision: Precision, exact: bool) -> Generated:
    """Return the kernel of any inverse in floating point; the arguments are those of `float_kernel`.

    Raises
    ------
    UnsupportedError
        If the program has no kernel.
    """
    source = Source()
    ops = FloatOps(source, precision, exact)
    return _generated(program, source, ops, TileEvaluator(program, ops).run(), ())


def _generated(
    program: StepList, source: Source, ops: TritonOps, result: Placed[Tile], counted: tuple[str, ...]
) -> Generated:
    _check_products(program, source)
    body = list(source.statements)
    floating = isinstance(ops, FloatOps)
    long = len(body) > LONG_KERNEL and not floating
    joined = program.chunk <= JOINED_CHUNK and not long
    for i, values in enumerate(_rows(program, source, ops, result)):
        _store(source, i, _joined(source, values) if joined else values)
    tail = source.statements[len(body) :]
    looped = rolled(body, tail, program.chunk // TILE) if long and not counted else body
    loaded = 0 < len(source.scalars) <= LOADED_SCALARS
    return Generated(
        text=_text([*looped, *tail] if joined else hoisted(looped, tail), len(source.scalars), loaded),
        scalars=tuple(source.scalars),
        loaded=loaded,
        counted=counted,
        chunk=program.chunk,
        group=4 if long or (len(body) <= SHORT_KERNEL and not floating) else 1,
        registers=_registers(program.chunk, len(body), ops),
        fused=ops.fusable,
    )


def _check_products(program: StepList, source: Source) -> None:
    products = sum(statement.kind is Kind.PRODUCT for statement in source.statements)
    if products > MAX_PRODUCTS:
        raise UnsupportedError(
            f"{program.title} takes {products} products of tiles; kernels have at most {MAX_PRODUCTS}"
        )


def _text(statements: Sequence[Statement], scalars: int, loaded: bool) -> str:
    names = [f"s{i}" for i in range(scalars)]
    lines = rendered(statements)
    if loaded:
        lines = [*(f"{name} = tl.load(scalars + {i})" for i, name in enumerate(names)), *lines]
        names = ["scalars"]
    arguments = "".join(f"{name}, " for name in names)
    return TEMPLATE.replace("<arguments>", arguments) + "".join(f"    {line}\n" for line in lines)


def _registers(chunk: int, statements: int, ops: TritonOps) -> int | None:
    """Return a limit that costs few spills and lets more warps run, if there is one, as measured."""
    joined = chunk <= JOINED_CHUNK
    if isinstance(ops, FloatOps):
        few = ops.precision is Precision.TF32
        return (128 if few else 168) if joined else None
    if statements > LONG_KERNEL:
        return 128 if joined else 168
    return 128 if statements <= SHORT_KERNEL else None


def _rows(program: StepList, source: Source, ops: TritonOps, result: Placed[Tile]) -> list[list[Expression]]:
    """Return the variables that hold T, tile by tile."""
    count = program.chunk // TILE
    rows = []
    for i in range(count):
        values = []
        for j in range(count):
            tile = result.tiles.get((i, j))
            value = source.once(ZEROS) if tile is None else ops.real(tile)
            if i == j and not program.inverse_ports.holds_identity:
                value = source.assign("{} + tl.where({}, 1.0, 0.0)", value, DIAGONAL)
            values.append(value)
        rows.append(values)
    return rows


def _joined(source: Source, values: list[Expression]) -> list[Expression]:
    width = TILE
    while len(values) > 1:
        width *= 2
        pairs = zip(values[::2], values[1::2], strict=True)
        joins = [expression("tl.permute(tl.join({}, {}), (0, 1, 3, 2))", a, b) for a, b in pairs]
        values = [source.assign("tl.reshape({}, (NB, 16, {}))", join, width) for join in joins]
    return values


def _store(source: Source, i: int, values: list[Expression]) -> None:
    mask = inside(source, i)
    for j, value in enumerate(values):
        columns = f"tl.arange(0, CHUNK // {len(values)})[None, None, :] + {j * TILE}"
        place = f"T + base + (row + {i * TILE}) * STRIDE + {columns}"
        source.call("store_tile({}, {}, {}, FULL)", place, value, mask)


def hoisted(body: Sequence[Statement], tail: Sequence[Statement]) -> list[Statement]:
    """Return ``body`` with every statement of ``tail`` right after the last one on which it depends.

    A statement that reads an undefined variable comes first: `rendered` refuses it.
    """
    places = {statement.variable: i for i, statement in enumerate(body)}
    behind: dict[int, list[Statement]] = {}
    for statement in tail:
        place = max((places.get(name, -1) for name in statement.reads), default=-1)
        behind.setdefault(place, []).append(statement)
        if statement.variable:
            places[statement.variable] = place
    merged = list(behind.get(-1, ()))
    for i, statement in enumerate(body):
        merged += [statement, *behind.get(i, ())]
    return merged
