"""Inverse of diagonal blocks, merged pairwise: every range has a bound."""

from __future__ import annotations

from qinvert.checks import check_member, check_power_of_two
from qinvert.errors import ProgramError
from qinvert.methods._blocks import PROVED, Layout, diagonal_mask, merge_mask
from qinvert.methods._builder import Builder
from qinvert.methods._corrections import check_corrections, correct
from qinvert.methods._factored_merge import factored_merge
from qinvert.methods._method import Method
from qinvert.methods._packed import merge_packed, stack_diagonal
from qinvert.program.program import Program
from qinvert.program.residual_sums import residuals_as_sums
from qinvert.program.steps import check_chunk

#: Tiles in which candidates merge by masked products: these steps are fewer and wider than for blocks.
TILE = 16


def block_merge(
    chunk: int,
    base: int | None = None,
    layout: str | None = None,
    tile: int | None = None,
    corrections: int = 0,
    factored: bool = False,
) -> Program:
    """``T21 = T22 M21 T11``, from diagonal blocks of size ``base`` up to C.

    A block ``[[I - M11, 0], [-M21, I - M22]]`` has the inverse
    ``[[T11, 0], [T21, T22]]``.  With ``T = I + S`` the identities never become
    integers: they turn into residual terms inside the accumulator,

        Y = M21 S11 + M21 = M21 T11,      S21 = S22 Y + Y = T22 Y.

    Blocks of size ``base`` start from the Neumann series by doubling inside
    the block; with base 1 the first merge is M itself (method MBH), with base
    16 this is method MXR.  Inside tiles larger than ``base`` all merges of
    one level are two masked products together, ``Y = m S + m`` and then
    ``S <- S + Y + S Y``, where m is the masked M.

    Each of the ``corrections`` measures the error that rounding left, on a fine
    scale of its own, and removes it: with ``R = I - (I - M)(I + S)``,

        R = M S + M - S,      S <- S + (S R + R).

    In integers R is exact up to its one rounding, so one correction brings
    int8 to the floor, which only the quantized M and the output grid set.

    The *factored* form keeps beta out of the matrices: with B = diag(beta),
    ``M = B K`` and ``T = I + B W``, so ``W = K T``, and a merge is
    ``W21 = (I + W22 B2) K21 (I + B1 W11)``.  With masks, and W block diagonal,

        S = B W,   Y = m S + m,   V = W B,   W <- W + (V Y + Y),   m the masked K.

    Then rows with a small beta also use the whole grid: int8 gains 3.3 dB for keys of
    cosine 0.5 and beta uniform in [0, 1].  A correction has ``R = K S + K - W``
    and ``W <- W + (V R + R)``; the error that remains is the rounding of S.

    Cost: ``2 log2(C / base)`` products of half blocks (packed, 0.1 M
    multiply-accumulates at C = 64 and base 4), or of dense tiles (masked);
    each correction adds 2 dense products, and each factored merge 2 scalings.
    Range: for unit keys and ``0 <= beta_i <= 2``, ``|M|, |S|, |Y| <= beta_i``:
    an entry of S or Y is ``beta_i k_i^T (product of contractions) k_j``, where
    decay only shrinks.  Without its factor beta_i that is an entry of K, W, Y
    or V Y + Y of the factored form, at most 1; S is at most beta_i again, and
    ``V[i, j] = W[i, j] beta_j`` at most beta_j.
    Powers inside a base block have no such bound: keep ``base`` small.
    Stability: logarithmic in C.

    Parameters
    ----------
    chunk : int
        Size C, a power of two.
    base : int, optional
        Size of the first blocks, a power of two up to ``chunk``; 4 or less by
        default.
    layout : {"packed", "masked"}
        ``packed`` is ``tile=base``, ``masked`` is ``tile=chunk``; packed by
        default, masked where factored.
    tile : int, optional
        Merge by masks up to this size and by packed blocks above it, with all
        tiles stacked; 16 keeps the products wide enough for a matrix unit.
    corrections : int
        Residual corrections at the end, 0 to 4.
    factored : bool
        Take beta as a separate input.  The layout is then masked, and the base is
        1 or 2, by default 2.

    Raises
    ------
    ProgramError
        If an argument is out of range.

    References
    ----------
    arXiv 2605.21325, methods MBH (base 1) and MXR (base 16).
    """
    check_chunk(chunk)
    if factored:
        base = 2 if base is None else base
        _check_factored(chunk, base, layout, tile, corrections)
        return factored_merge(chunk, base, corrections)
    base, layout = min(4, chunk) if base is None else base, layout or Layout.PACKED
    tile = _check_arguments(chunk, base, layout, tile, corrections)
    builder = Builder(chunk)
    tiles = builder.matrix if tile == chunk else stack_diagonal(builder, chunk, tile)
    total = _invert_tiles(builder, tiles, base, tile)
    total = merge_packed(builder, total, chunk, tile)
    total = correct(builder, total, corrections)
    parameters: dict[str, int | str] = {"base": base}
    if tile != max(base, 2):
        parameters |= {"layout": Layout.MASKED} if tile == chunk else {"tile": tile}
    if corrections:
        parameters["corrections"] = corrections
    return builder.program("block_merge", parameters, total)


def _check_arguments(chunk: int, base: int, layout: str, tile: int | None, corrections: int) -> int:
    check_power_of_two("base", base, 1, chunk, ProgramError)
    check_member(Layout, "layout", layout, ProgramError)
    check_corrections(corrections)
    if tile is None:
        return chunk if layout == Layout.MASKED else max(base, 2)
    check_power_of_two("tile", tile, max(base, 2), chunk, ProgramError)
    if layout == Layout.MASKED and tile != chunk:
        raise ProgramError(f"layout 'masked' means tile={chunk}; leave out one of layout and tile={tile}")
    return tile


def _check_factored(chunk: int, base: int, layout: str | None, tile: int | None, corrections: int) -> None:
    _check_arguments(chunk, base, layout or Layout.PACKED, tile, corrections)
    if base > 2 or layout == Layout.PACKED or tile not in (None, chunk):
        raise ProgramError(
            f"factored merges are masked and start from base 1 or 2, got base {base}, layout {layout!r} "
            f"and tile {tile!r}; leave them out"
        )


def _invert_tiles(builder: Builder, source: str, base: int, tile: int) -> str:
    size = max(base, 2)
    blocks = source
    if size < tile:
        blocks = builder.mask(f"base_{size}/masked_M", source, diagonal_mask(tile, size), bound=PROVED)
    total = _invert_base(builder, blocks, size)
    while size < tile:
        masked = builder.mask(f"merge_{2 * size}/M21", source, merge_mask(tile, size), bound=PROVED)
        half_product = builder.matmul(f"merge_{2 * size}/Y", masked, total, add=(masked,), bound=PROVED)
        total = builder.matmul(
            f"merge_{2 * size}/S", total, half_product, add=(half_product, total), bound=PROVED
        )
        size *= 2
    return total


def _invert_base(builder: Builder, blocks: str, size: int) -> str:
    if size == 2:
        return builder.rescale("base_2/S", blocks, bound=PROVED)
    power = total = blocks
    k = 1
    while 2 * k < size:
        k *= 2
        power = builder.matmul(f"base_{size}/power_{k}", power, power)
        total = builder.matmul(
            f"base_{size}/S" if 2 * k == size else f"base_{size}/sum_{2 * k}",
            total,
            power,
            add=(total, power),
            bound=PROVED if 2 * k == size else None,
        )
    return total


def _candidates(chunk: int) -> tuple[Program, ...]:
    bases = [base for base in (16, 8, 4, 2) if base <= chunk]
    tile = min(TILE, chunk)
    return tuple(block_merge(chunk, base, tile=tile, corrections=k) for k in (0, 1) for base in bases)


def _on_chips(chunk: int) -> tuple[Program, ...]:
    tile = min(TILE, chunk)
    base = min(4, chunk)
    sums = (
        block_merge(chunk, 1, layout=Layout.MASKED),
        block_merge(chunk, base),
        block_merge(chunk, 1, tile=tile),
    )
    widened = (block_merge(chunk, 2, layout=Layout.MASKED), block_merge(chunk, base))
    corrected = tuple(block_merge(chunk, b, tile=tile, corrections=1) for b in (2, base))
    return (*map(residuals_as_sums, sums), *widened, *corrected)


def _factored(chunk: int, free_residuals: bool) -> tuple[Program, ...]:
    # The residual of a correction has the term - W, which is free.
    corrections = (0, 1) if free_residuals else (0,)
    return tuple(block_merge(chunk, corrections=k, factored=True) for k in corrections)


METHOD = Method(
    name="block_merge",
    build=block_merge,
    candidates=_candidates,
    automatic=_candidates,
    on_chips=_on_chips,
    factored=_factored,
    rank=1,
    automatic_rank=2,
)
