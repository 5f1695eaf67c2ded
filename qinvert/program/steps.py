"""The kinds of steps that programs are made of, as data.

Every tensor is a stack of equal blocks, ``[blocks, rows, columns]`` per input
matrix.  A batch of ``B`` inputs is folded into the first axis with the block
index slowest, ``[blocks * B, rows, columns]``, so that slicing and
concatenating blocks never touches the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple, TypeAlias

from qinvert.checks import check_power_of_two, is_float32
from qinvert.errors import ProgramError

#: The delta rule is stable up to this beta; above it no range has a bound.
MAX_BETA: Final = 2.0
#: Added to the squared norm of queries and keys, as the models do.
NORM_EPSILON: Final = 1e-6
#: A smaller beta counts as this one: half precision holds it, and K = M / beta stays finite.
MIN_BETA: Final = 2.0**-14
#: Largest chunk size that block structure and the runtimes support.
MAX_CHUNK: Final = 1024
#: A tensor holds at most this many times the elements of the largest port; built-in methods need 1.
MAX_EXPANSION: Final = 16
#: A product takes at most this many times the multiply-accumulates of one of square matrices as large as
#: the largest port; built-in methods need 1.
MAX_WORK: Final = 4
#: Most multiply-accumulates of a program; Neumann's series of 1,023 terms of chunks of 1,024 needs 2^40.
MAX_MACS: Final = 2**40
#: Largest number of residual terms of one product; built-in methods need 2.
MAX_RESIDUALS: Final = 8
#: Largest number of steps of a program; built-in methods need at most 5,112.
MAX_STEPS: Final = 20_000
#: Limits of ``|factor|`` of a `Rescale`: those of any scale, because graphs write it as a separate scale.
MIN_FACTOR: Final = 1e-30
MAX_FACTOR: Final = 1e15
#: Largest length of a name, so that graphs and tables stay readable.
MAX_NAME: Final = 200

Range: TypeAlias = tuple[int, int]


class Shape(NamedTuple):
    """``[blocks, rows, columns]`` of a tensor, per input matrix."""

    #: Blocks stacked on the batch axis.
    blocks: int
    #: Rows of one block.
    rows: int
    #: Columns of one block.
    columns: int

    def __str__(self) -> str:
        return f"[{self.blocks},{self.rows},{self.columns}]"


class Axis(StrEnum):
    """The axis along which `Concat` joins or `Scale` counts."""

    #: Stack on the batch axis.
    BLOCKS = "blocks"
    #: One block above the other.
    ROWS = "rows"
    #: Side by side.
    COLUMNS = "columns"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A 0/1 matrix, the same for every block: masks, zero blocks, and operands of products and sums."""

    name: str
    rows: int
    columns: int
    #: Column ranges ``start <= j < stop`` that hold 1, one per row.
    ones: tuple[Range, ...]

    def __post_init__(self) -> None:
        legal = all(0 <= a <= b <= self.columns for a, b in self.ones)
        if self.rows < 1 or len(self.ones) != self.rows or not legal:
            raise ProgramError(
                f"constant {self.name!r}: needs at least one row, and one column range inside "
                f"[0, {self.columns}] for each of its {self.rows} rows; got {len(self.ones)} ranges"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MatMul:
    """``output = left @ right + sum(add) - sum(subtract)``, rounded at the end.

    The residual terms join in the accumulator's precision.  Each of them is
    ``left`` or ``right`` itself or any tensor of the result's shape.
    """

    output: str
    left: str
    right: str
    add: tuple[str, ...] = ()
    subtract: tuple[str, ...] = ()
    #: ``max|output| <= bound * max(beta)`` for unit keys; None if no proof is known.  In a
    #: program that takes beta, only a `Scale` has that factor; for other steps ``max|output| <= bound``.
    bound: float | None = None
    #: Whether values beyond the range of the steps that read the output may saturate, because no
    #: output of the program depends on them.  Such a step has no bound.
    partial: bool = False

    def __post_init__(self) -> None:
        _check_partial(self)

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.left, self.right, *self.add, *self.subtract)


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    """``output = left + right``."""

    output: str
    left: str
    right: str
    bound: float | None = None
    #: As in `MatMul`.
    partial: bool = False

    def __post_init__(self) -> None:
        _check_partial(self)

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.left, self.right)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subtract:
    """``output = left - right``."""

    output: str
    left: str
    right: str
    bound: float | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.left, self.right)


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiply:
    """``output = left * right``, elementwise; one row, one column or one number is repeated."""

    output: str
    left: str
    right: str
    bound: float | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.left, self.right)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exponential:
    """``output = exp(source)`` of values that are not positive, so that the result lies in (0, 1]."""

    output: str
    source: str
    bound: float | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescale:
    """``output = factor * source``, rounded onto a scale of its own."""

    output: str
    source: str
    #: A float32 value, not zero.
    factor: float = 1.0
    bound: float | None = None

    def __post_init__(self) -> None:
        if not is_float32(self.factor) or not MIN_FACTOR <= abs(self.factor) <= MAX_FACTOR:
            raise ProgramError(
                f"step {self.output!r}: factor {self.factor!r} is not a float32 of magnitude "
                f"{MIN_FACTOR:g} to {MAX_FACTOR:g}; round it to float32, or leave a zero term out"
            )
        object.__setattr__(self, "factor", float(self.factor))

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """``output = diag(vector) @ source`` (rows) or ``source @ diag(vector)`` (columns)."""

    output: str
    source: str
    #: An input of the program with one column, which only scales may read.
    vector: str
    #: `Axis.ROWS` or `Axis.COLUMNS`.
    axis: Axis
    bound: float | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source, self.vector)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """``output = source * constant``: it keeps or clears elements and never rounds.

    A source of one row or one column is repeated to the size of the constant.
    """

    output: str
    source: str
    constant: str
    bound: float | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source, self.constant)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transpose:
    """``output = source^T``, block by block."""

    output: str
    source: str
    bound: float | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """``output = source[blocks, rows, columns]`` with half-open ranges; None keeps an axis."""

    output: str
    source: str
    blocks: Range | None = None
    rows: Range | None = None
    columns: Range | None = None
    bound: float | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Concat:
    """``output = sources`` joined along ``axis``; all of them have the output's scale."""

    output: str
    sources: tuple[str, ...]
    axis: Axis
    bound: float | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.sources


Step: TypeAlias = (
    MatMul | Add | Subtract | Multiply | Exponential | Rescale | Scale | Mask | Transpose | Slice | Concat
)
#: Steps that move values without rounding: input and output share one scale.
MOVES: Final = (Mask, Transpose, Slice, Concat)


def partial_outputs(steps: Iterable[Step]) -> set[str]:
    """Return the outputs of partial steps."""
    return {step.output for step in steps if isinstance(step, (MatMul, Add)) and step.partial}


def _check_partial(step: MatMul | Add) -> None:
    if step.partial and step.bound is not None:
        raise ProgramError(
            f"step {step.output!r} is partial and has the bound {step.bound!r}; leave out the bound, which "
            "would hold for all of its values, or partial"
        )


def check_chunk(chunk: int) -> None:
    """Refuse a chunk size that is not a power of two in [2, `MAX_CHUNK`].

    Raises
    ------
    ProgramError
        With the value and the legal ones.
    """
    hint = "; pad the last chunk with zero rows to the next power of two"
    check_power_of_two("chunk", chunk, 2, MAX_CHUNK, ProgramError, hint)
