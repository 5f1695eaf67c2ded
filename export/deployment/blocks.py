"""The choice of sparse attention among blocks of tokens, by sums, products and one TopK."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch

from qinvert.export.deployment.cache import WindowCache, is_zero
from qinvert.export.deployment.states import StateKind

#: Numbers of blocks are multiples of it: prefix sums go over so many, and then over the groups.
GROUP: Final = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockSizes:
    """How many blocks there are, and how many of them a query takes."""

    #: Tokens of a block.
    tokens: int
    #: Blocks that a query takes.
    chosen: int
    #: Positions that a deployment knows.
    positions: int
    #: Block of each position up to that number, int32; as a constant, which a trace does not compute.
    numbers: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        numbers = torch.arange(self.positions + 1, dtype=torch.int32) // self.tokens
        object.__setattr__(self, "numbers", numbers)

    @property
    def blocks(self) -> int:
        """Blocks that a state holds, a multiple of `GROUP`."""
        return -(-self.positions // (self.tokens * GROUP)) * GROUP

    @property
    def takes_all(self) -> bool:
        """Whether a query takes every block that it can ever see."""
        return self.chosen >= self.positions // self.tokens

    def block_of(self, positions: torch.Tensor) -> torch.Tensor:
        """``floor(position / tokens)`` for positions ``[n]`` from 0 to ``positions``, looked up."""
        return torch.index_select(self.numbers, 0, positions)


def block_keys(
    cache: WindowCache,
    layer: int,
    inputs: torch.Tensor,
    sizes: BlockSizes,
    pool: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return the keys of all full blocks up to the end of a window, and hand them on.

    A block takes ``tokens`` tokens in the order of their positions.  Inputs of the block that
    is not full are a state; those of the window are put behind them, and blocks that are full
    are put behind those that were.  What puts them there are products with 0 and 1, which are
    exact.

    Parameters
    ----------
    cache : WindowCache
    layer : int
    inputs : torch.Tensor, float32 ``[1, T, W]``
        What a block's key is made of, for each token.
    sizes : BlockSizes
    pool : callable
        Maps the inputs of blocks ``[1, n, tokens, W]`` to their keys ``[1, n, D]``; finite for zeros.

    Returns
    -------
    torch.Tensor, float32 ``[1, blocks, D]``
        0 for blocks that are not full.
    """
    window, width, size = inputs.shape[1], inputs.shape[2], sizes.tokens
    local = -(-(size - 1 + window) // size)
    number = sizes.block_of(cache.first)
    offset = (cache.first - number * size).to(torch.float32)
    tail = cache.traffic.take(StateKind.TAIL, (1, size, width), layer)
    empty = torch.zeros(1, (local - 1) * size, width, dtype=torch.float32)
    rows = torch.cat([tail, empty], 1) + _moved(local * size, window, offset) @ _counted(inputs, cache)
    end = offset + cache.counted.sum(1)
    full = (end - (_steps(local) * size + (size - 1.0))).clamp(0.0, 1.0)
    rest = _moved(local * size, size, full.sum(0, keepdim=True) * size).transpose(1, 2) @ rows
    cache.traffic.give(StateKind.TAIL, rest, layer)
    pooled = pool(rows.reshape(1, local, size, width))
    before = cache.traffic.take(StateKind.BLOCKS, (1, sizes.blocks, pooled.shape[2]), layer)
    after = before + (_moved(sizes.blocks, local, number.to(torch.float32)) * full) @ pooled
    cache.traffic.give(StateKind.BLOCKS, after, layer)
    return after


def _counted(inputs: torch.Tensor, cache: WindowCache) -> torch.Tensor:
    """Put 0 in the place of padding."""
    return inputs if cache.valid is None else inputs * cache.valid[:, :, None]


def _moved(rows: int, columns: int, by: torch.Tensor) -> torch.Tensor:
    """``E[r, c] = 1`` at ``r = c + by``, else 0, float32 ``[1, rows, columns]``; ``by`` is ``[1]``."""
    return is_zero((_steps(rows)[:, None] - _steps(columns))[None] - by)


def _steps(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32)


def visible_entries(cache: WindowCache, scores: torch.Tensor, sizes: BlockSizes) -> torch.Tensor:
    """Entries of a cache and a window that lie in chosen blocks, or in the one that is not full.

    A query at position p sees the first ``floor((p + 1) / tokens)`` blocks whole, and takes the
    best of these.  Tokens behind them are left to the causal mask.

    Parameters
    ----------
    cache : WindowCache
    scores : torch.Tensor, float32 ``[1, T, blocks]``
    sizes : BlockSizes

    Returns
    -------
    torch.Tensor, bool ``[1, 1, T, cache + T]``
    """
    whole = sizes.block_of(cache.positions[0] + 1).to(torch.float32)
    seen = (whole[None, :, None] - _steps(sizes.blocks)[None, None]).clamp(0.0, 1.0)
    kept = 1.0 - seen * (1.0 - best(scores, seen, sizes.chosen))
    entries = cache.entries(sizes.block_of(cache.positions[0]), sizes.tokens)
    # Rows are faster to look up than columns.
    rows = torch.index_select(kept[0].transpose(0, 1), 0, entries)
    return (rows.transpose(0, 1) > 0.5)[None, None]


def best(scores: torch.Tensor, seen: torch.Tensor, count: int) -> torch.Tensor:
    """1 for the ``count`` highest scores that are seen, of equal ones the first, else 0.

    With b the lowest of the ``count`` highest scores, those above b are in, and of those equal
    to b the first, until there are ``count``.  So it does not matter which of equal scores
    TopK takes, which PyTorch and compilers leave open.

    Parameters
    ----------
    scores : torch.Tensor, float32 ``[1, T, N]``
        N is a multiple of `GROUP`.
    seen : torch.Tensor, float32 ``[1, T, N]``
        1 for the first blocks, and 0 behind them.  Where fewer than ``count`` are seen, all of
        them are taken, and some that are not.
    count : int

    Returns
    -------
    torch.Tensor, float32 ``[1, T, N]``
    """
    # What is not seen stands behind what is, so that the lowest score of a row is low enough for it.
    filled = scores * seen + scores.amin(2, keepdim=True) * (1.0 - seen)
    bound = torch.topk(filled, count, dim=2, sorted=False).values.amin(2, keepdim=True)
    above, equal = ((filled > bound).to(torch.float32), (filled == bound).to(torch.float32))
    left = count - above.sum(2, keepdim=True)
    return above + equal * (left - ones_before(equal)).clamp(0.0, 1.0)


def ones_before(x: torch.Tensor) -> torch.Tensor:
    """``y[n] = sum_{m < n} x[m]`` along the last axis, by products with triangles of ones.

    Parameters
    ----------
    x : torch.Tensor, float32 ``[1, T, N]``
        N is a multiple of `GROUP`.

    Returns
    -------
    torch.Tensor, float32 ``[1, T, N]``
        Exact for whole numbers whose sum is below 2^24.
    """
    groups = x.reshape(1, x.shape[1], -1, GROUP)
    inside = groups @ _triangle(GROUP)
    before = groups.sum(3) @ _triangle(groups.shape[2])
    return (inside + before[..., None]).reshape(x.shape)


def _triangle(size: int) -> torch.Tensor:
    # Of rank 3: products with constants of rank 2 are those that may get integer weights.
    steps = _steps(size)
    return (steps - steps[:, None]).clamp(0.0, 1.0)[None]
