"""Inverse by block elimination inside one matrix: log2(C) products, and every range has a bound."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from qinvert.checks import check_integer, check_member, check_power_of_two
from qinvert.errors import ProgramError
from qinvert.methods._blocks import PROVED, diagonal_mask, merge_mask
from qinvert.methods._builder import Builder
from qinvert.methods._corrections import check_corrections, correct, correct_factored
from qinvert.methods._method import Method
from qinvert.methods._packed import merge_packed, stack_diagonal
from qinvert.program.program import Program
from qinvert.program.residual_sums import residuals_as_sums
from qinvert.program.steps import Axis, Constant, check_chunk

#: Tiles in which candidates eliminate before they merge or restart, as in `qinvert.methods.block_merge`.
TILE = 16
#: How many times larger a level may make the finished blocks.
RADICES = (2, 4)


class Side(StrEnum):
    """From which side the eliminated blocks multiply."""

    #: ``N S``: the rest is ``X R``.
    LEFT = "left"
    #: ``S N``: the rest is ``R X``.
    RIGHT = "right"


def elimination(
    chunk: int,
    side: str = "left",
    tile: int | None = None,
    restart: int | None = None,
    corrections: int = 0,
    factored: bool = False,
    radix: int = 2,
) -> Program:
    """``S_0 = M``, ``N = m_k S_k``, ``S_{k+1} = S_k + N S_k`` for k = 0 ... log2(C) - 1; then ``T = I + S``.

    The mask m_k is 1 on the lower left quarter of every diagonal block of size
    2^(k + 1).  With ``side="right"`` every level is ``S_{k+1} = S_k + S_k N``.
    The two must not be mixed.

    Let D_k be the diagonal blocks of size 2^k of M, and ``X_k = (I - D_k)^-1``.
    Then for every k

        S_k = X_k M = (X_k - I) + X_k (M - D_k)    (left),    S_k = M X_k    (right):

    the finished blocks, and beside them the rest, already multiplied by them.
    One matrix with one scale holds both, and no identity ever becomes an
    integer.  Proof, left: ``S_0 = M``, and the second form follows from
    ``X_k D_k = X_k - I``.  X_k is block diagonal, so ``N = X_k (D_{k+1} - D_k)``,
    ``I - D_{k+1} = (I - D_k) (I - N)``, and ``N^2 = 0``.  Hence ``X_{k+1} = (I + N) X_k``
    and ``(I + N) S_k = X_{k+1} M``.  In the end ``X = T`` and ``T M = T - I = S``.

    With ``tile`` elimination runs inside tiles, all stacked, and ``chunk / tile``
    of them merge as in `block_merge`.  With ``restart=k`` the first k levels
    see D_k alone, and the rest is multiplied at once, from the exact M:

        S = X_k - I,   R = M - D_k,   S_k = S + R + S R    (left),    S + R + R S    (right).

    With ``radix=4`` one level brings finished blocks of size h to 4h.  N is S_k
    below the diagonal blocks of h and inside those of 4h, and ``N^4 = 0``:

        Z_0 = S_k,    Z_{j+1} = S_k + N Z_j    (left),    S_k + Z_j N    (right),
        Z_3 = (I + N + N^2 + N^3) S_k    (left),    S_k (I + N + N^2 + N^3)    (right).

    That is S of the blocks of 4h, by the proof above with ``(I - N)^-1 = I + N + N^2 + N^3``
    in place of ``I + N``.  If log2(C) is odd, the middle level has radix 2.

    No result depends on what Z_1 and Z_2 hold where they are not final.  Right:
    number the four column blocks of a diagonal block of 4h from 0.  Column block c of
    N is zero except in row blocks d > c, so that of Z_{j+1} is
    ``S_k[:, c] + sum_{d > c} Z_j[:, d] N[d, c]``.  By induction over j, column block c of Z_j
    is that of Z_3 if ``c >= 3 - j``: for j = 0 the sum is empty, and for j + 1 all d > c
    are final in Z_j.  The final columns of Z_{j+1} thus read final columns of Z_j
    alone, and all columns of Z_3 are final.  Left: the same with row blocks, final in
    Z_j if ``r <= j``.  What is final has the range of the result, and its product
    that of the last product.  The rest has no such range, and where it saturates
    only the rest of the next sum is wrong; hence these steps are `partial`.

    Corrections are those of `block_merge`.  The *factored* form takes ``M = B K``
    with B = diag(beta), and ``T = I + B W``: from ``W_0 = K``,

        N = m_k W_k,    W_{k+1} = W_k + (N B) W_k    (left),    W_k + W_k (B N)    (right),

    with one scaling a level, where a factored merge has two.

    Cost: log2(C) dense products, 6 at C = 64, each with one residual term that
    is its operand; no fewer can do, since T has the degree C - 1 in M.  With
    tiles, log2(tile) products of dense tiles and two for each merge; one
    product more with a restart, 2 for each correction.  On tiles of 16, as in
    kernels, C = 64 takes 50 products dense and 32 with ``tile=16`` or
    ``restart=4``, where `block_merge` takes 40.  With radix 4 two levels take three
    products, 9 in all at C = 64, and one new N, of which all three read one.  Hexagon
    v73 needs long for a new right operand: as sums (`residuals_as_sums`), in thousand
    simulated cycles at C = 32, 64, 128 for 8 matrices in 8 chains, radix 2 from the left
    and radix 4 from the right take 36.0, 62.3, 173.7 and 29.2, 47.7, 154.5 in uint8, and
    81.6, 175.2, 668.1 and 67.9, 112.1, 389.0 in int16.  v81 gains at 128 alone: 22.1, 26.7,
    73.7 and 27.9, 29.6, 63.4; 23.0, 38.6, 157.7 and 25.0, 44.6, 141.2.  Ethos-U gains nothing.
    In products, all but the first Z of a level add a term that is not an operand, so
    that only the divide form takes them; sums take both forms.
    Range: for unit keys and ``0 <= beta_i <= 2``, ``|S_k|, |N| <= beta_i``: with
    s the first row of the block of i on the left, or row j + 1 if that comes
    later, ``(X_k M)[i, j] = -beta_i k_i^T (I - beta_{i-1} k_{i-1} k_{i-1}^T) ...
    (I - beta_s k_s k_s^T) k_j``, a product of contractions, where decay only
    shrinks.  Without their factor beta_i, W_k and N are at most 1, and N B is
    at most beta_j.  On all stress sets no tensor exceeds the larger of max|M|
    and max|T - I|, but Z_1 and Z_2 reach 3.35 times as much on `filled_blocks`, and
    up to 2.0 times on the other sets.  With b = max(beta), ``|Z_1| <= b + 3 h b^2``
    and ``|Z_2| <= b + 3 h b^2 + 2 h^2 b^3``.  Floats must hold them, because infinity times a
    zero of N is NaN: float16 does so up to C = 512 for b = 1, and 128 for b = 2.
    Stability: logarithmic in C.  Relative errors (Frobenius norm) on
    ``0.5 tril(rand)``, C = 16, 32, 64, 128: float32 2.4e-8, 4.5e-8, 8.5e-8, 1.6e-7;
    float16 1.6e-4, 2.5e-4, 4.0e-4, 6.4e-4; bfloat16 1.2e-3, 2.0e-3, 3.2e-3, 5.1e-3.
    That is 0.8 times the error of `block_merge` from 1 in float32 and 1.4 times
    in the others, where every level rounds all of the rest anew.  int8 loses 1
    to 1.6 dB on it for the same reason; a restart at 4, or tiles of 16, leave
    0.3 to 0.9 dB of that, and one correction reaches the floor.  Where the signs
    of T alternate by rows (`beta_ones`), left wins 6 dB and right loses 4.5.
    Radix 4 has 0.85 to 0.9 times the error of radix 2 in float16 and bfloat16, and
    0.95 to 1.12 times in float32.  On keys, int8 gains up to 0.6 dB and int16 0.5 to 0.9.
    Factored, int8 gains 3.5 dB for keys of cosine 0.5 and beta uniform in [0, 1].

    Parameters
    ----------
    chunk : int
        Size C, a power of two.
    side : {"left", "right"}
        Where N stands.
    tile : int, optional
        Eliminate up to this size and merge packed blocks above it, a power of
        two from 2; ``chunk``, the whole matrix, by default.
    restart : int, optional
        Level k at which S_k is computed from the exact M, 1 to
        ``log2(tile) - 1``; none by default.
    corrections : int
        Residual corrections at the end, 0 to 4.
    factored : bool
        Take beta as an input of its own; dense, without restart.
    radix : {2, 4}
        How many times larger one level makes the finished blocks.

    Raises
    ------
    ProgramError
        If an argument is out of range.

    References
    ----------
    The factors of ``T = (I + N_{p-1}) ... (I + N_0)``, p = log2 C, are block
    elementary matrices: the product form of the inverse, which A. H. Sameh and
    R. P. Brent, "Solving triangular systems on a parallel computer", SIAM J.
    Numer. Anal. 14 (1977), evaluate column by column in a tree of depth log2 C
    (N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed.,
    section 8.4, with its error analysis), and N. J. Higham and A. Pothen, SIAM
    J. Sci. Comput. 15 (1994), for groups of columns.  Here the right-hand side
    is M itself, and so each factor is read off the partial result.  That step
    was found neither there, nor in arXiv 2605.21325 and 2606.06034, nor in a
    search of public code.
    """
    check_chunk(chunk)
    tile = _check_arguments(chunk, side, tile, restart, corrections, radix)
    if factored:
        _check_factored(chunk, tile, restart)
        return _factored(chunk, Side(side), corrections, radix)
    builder = Builder(chunk)
    tiles = builder.matrix if tile == chunk else stack_diagonal(builder, chunk, tile)
    total = _eliminate(builder, tiles, tile, Side(side), restart, radix)
    total = merge_packed(builder, total, chunk, tile)
    total = correct(builder, total, corrections)
    parameters: dict[str, int | str | None] = {
        "side": None if side == Side.LEFT else Side.RIGHT.value,
        "tile": None if tile == chunk else tile,
        "restart": restart,
        "corrections": corrections or None,
        "radix": None if radix == 2 else radix,
    }
    return builder.program("elimination", _given(parameters), total)


def _given(parameters: Mapping[str, int | str | None]) -> dict[str, int | str]:
    return {name: value for name, value in parameters.items() if value is not None}


def _check_arguments(
    chunk: int, side: str, tile: int | None, restart: int | None, corrections: int, radix: int
) -> int:
    check_member(Side, "side", side, ProgramError)
    tile = chunk if tile is None else tile
    check_power_of_two("tile", tile, 2, chunk, ProgramError)
    if restart is not None:
        last = tile.bit_length() - 2
        if last < 1:
            raise ProgramError(f"elimination inside {tile} x {tile} has one level; leave out restart")
        check_integer("restart", restart, 1, last, ProgramError, "; 2 ** restart is the size of exact blocks")
    check_corrections(corrections)
    if radix not in RADICES or isinstance(radix, bool):
        raise ProgramError(f"radix {radix!r} is unknown; use {' or '.join(map(str, RADICES))}")
    return tile


def _check_factored(chunk: int, tile: int, restart: int | None) -> None:
    if tile != chunk or restart is not None:
        raise ProgramError(
            f"factored elimination is dense and has no restart, got tile {tile} and restart {restart}; "
            "leave them out"
        )


def _eliminate(builder: Builder, source: str, tile: int, side: Side, restart: int | None, radix: int) -> str:
    total, half = source, 1
    if restart is not None:
        total, half = _restarted(builder, source, tile, side, 2**restart, radix), 2**restart
    return _levels(builder, total, tile, side, half, tile, radix)


def _levels(
    builder: Builder,
    total: str,
    tile: int,
    side: Side,
    half: int,
    size: int,
    radix: int,
    axis: Axis | None = None,
) -> str:
    """Append the levels that bring finished blocks of ``half`` to ``size``."""
    for factor in _factors(size // half, radix):
        total = _level(builder, total, tile, side, half, factor, axis)
        half *= factor
    return total


def _factors(ratio: int, radix: int) -> tuple[int, ...]:
    """Return what the levels multiply the size of the finished blocks by."""
    levels = ratio.bit_length() - 1
    if radix == 2:
        return (2,) * levels
    # The odd level comes in the middle.  At C = 128 it takes 1.6 times as long on Hexagon v73 where it
    # is first, and costs up to 1 dB of int8 where it is last; at C = 32 all places are within 7 %.
    before, after = levels // 4, levels // 2 - levels // 4
    return (4,) * before + (2,) * (levels % 2) + (4,) * after


def _level(
    builder: Builder, total: str, tile: int, side: Side, half: int, factor: int, axis: Axis | None
) -> str:
    name = f"eliminate_{factor * half}"
    corner = builder.mask(f"{name}/N", total, _corner_mask(tile, half, factor), bound=PROVED)
    if axis is not None:
        corner = builder.scale(f"{name}/V", corner, builder.beta, axis, bound=PROVED)
    series = total
    for j in range(1, factor - 1):
        series = _multiply(builder, f"{name}/Z_{j}", corner, series, (total,), side, partial=True)
    return _multiply(builder, f"{name}/{'S' if axis is None else 'W'}", corner, series, (total,), side)


def _corner_mask(tile: int, half: int, factor: int) -> Constant:
    """Return 1 below the diagonal blocks of ``half``, inside those that are ``factor`` times as large."""
    if factor == 2:
        return merge_mask(tile, half)
    size = factor * half
    ones = tuple((i // size * size, i // half * half) for i in range(tile))
    return Constant(name=f"corner_mask_{half}_{size}", rows=tile, columns=tile, ones=ones)


def _multiply(
    builder: Builder, output: str, x: str, y: str, add: tuple[str, ...], side: Side, partial: bool = False
) -> str:
    left, right = (x, y) if side is Side.LEFT else (y, x)
    return builder.matmul(output, left, right, add=add, bound=None if partial else PROVED, partial=partial)


def _restarted(builder: Builder, source: str, tile: int, side: Side, size: int, radix: int) -> str:
    name = f"restart_{size}"
    blocks = builder.mask(f"{name}/D", source, diagonal_mask(tile, size), bound=PROVED)
    blocks = _levels(builder, blocks, tile, side, 1, size, radix)
    rest = builder.mask(f"{name}/R", source, _beside_mask(tile, size), bound=PROVED)
    return _multiply(builder, f"{name}/S", blocks, rest, (blocks, rest), side)


def _beside_mask(tile: int, size: int) -> Constant:
    """Return 1 left of the diagonal blocks of ``size``."""
    ones = tuple((0, i // size * size) for i in range(tile))
    return Constant(name=f"beside_mask_{size}", rows=tile, columns=tile, ones=ones)


def _factored(chunk: int, side: Side, corrections: int, radix: int) -> Program:
    builder = Builder(chunk, factored=True)
    axis = Axis.COLUMNS if side is Side.LEFT else Axis.ROWS
    total = _levels(builder, builder.matrix, chunk, side, 1, chunk, radix, axis)
    total = correct_factored(builder, total, corrections)
    parameters: dict[str, int | str | None] = {
        "side": None if side == Side.LEFT else Side.RIGHT.value,
        "corrections": corrections or None,
        "factored": True,
        "radix": None if radix == 2 else radix,
    }
    return builder.program("elimination", _given(parameters), total)


def _candidates(chunk: int) -> tuple[Program, ...]:
    dense = (elimination(chunk), elimination(chunk, corrections=1))
    if chunk <= TILE:
        return dense
    tiled = tuple(elimination(chunk, tile=TILE, corrections=k) for k in (0, 1))
    # Sums put the series of a level on the grid of its result, whatever its unfinished columns hold.
    fours = residuals_as_sums(elimination(chunk, side=Side.RIGHT.value, radix=4))
    return (*dense, *tiled, elimination(chunk, restart=TILE.bit_length() - 1), fours)


def _on_chips(chunk: int) -> tuple[Program, ...]:
    dense, corrected, *rest = _candidates(chunk)
    tiles = [tile for tile in (TILE, 2 * TILE, 4) if tile < chunk]
    # The right operand of a level is then masked, and mostly zero: it is arranged for less.
    tiled = (elimination(chunk, side=Side.RIGHT, tile=tile) for tile in tiles)
    sums = (dense, *(program for program in rest if not program.parameters.get("tile")), *tiled)
    # Arrays that multiply tiles add a carried identity for less than a sum.
    carried = (
        program
        for program in rest
        if program.parameters.get("tile") and not program.parameters.get("corrections")
    )
    return (*map(residuals_as_sums, sums), dense, corrected, *carried)


# On a CPU the fewest products are not the fastest program, so plans for one stay what they are
# where no method is named, and so do those that must take beta.
METHOD = Method(
    name="elimination",
    build=elimination,
    candidates=_candidates,
    automatic=None,
    on_chips=_on_chips,
    factored=None,
    rank=1,
)
