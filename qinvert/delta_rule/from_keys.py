"""L from keys, gates and decays: the products that every delta rule shares.

No form here takes the exponential of a positive number: a decay from j to i
is ``exp(G_i - G_j)`` with the difference taken first, or a product of two such
factors over a pivot between j and i.  Splitting it into ``exp(G_i) exp(-G_j)``
overflows on real gates.
"""

from __future__ import annotations

from functools import reduce

import torch

from qinvert.errors import InputError


def from_keys(k: torch.Tensor, beta: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """``L[i, j] = beta_i <k_i, k_j> exp(G_i - G_j)`` for ``j < i``, ``G = cumsum(g)``.

    Parameters
    ----------
    k : torch.Tensor, shape ``(..., C, D)``
        Keys, as they enter the product (normalize them first).
    beta : torch.Tensor, shape ``(..., C)``
    g : torch.Tensor, shape ``(..., C)`` or ``(..., C, D)``
        Log decay, ``<= 0``; with one per channel, L is
        ``beta_i sum_d k_i[d] k_j[d] exp(G_i[d] - G_j[d])``.

    Returns
    -------
    torch.Tensor
        Shape ``(..., C, C)``, dtype of ``k``.  Inputs of 16 bits are summed in
        float32 and rounded once.
    """
    keys, beta, g = _wide(k, beta, g)
    # Autocast would multiply them in 16 bits.
    with torch.autocast(k.device.type, enabled=False):
        lower = torch.tril(decayed_products(keys * beta.unsqueeze(-1), keys, cumulative(g, keys)), -1)
    return lower if lower.dtype == k.dtype else lower.to(k.dtype)


def from_dplr(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """``L[i, j] = -sum_d a_i[d] b_j[d] exp(G_{i-1}[d] - G_j[d])`` for ``j < i``, ``G = cumsum(g)``.

    The recurrence with a diagonal plus a low-rank term (DPLR),
    ``S_t = (diag(exp(g_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T``, reads the old
    state before its own decay: row i has ``G_{i-1}`` where `from_keys` has
    ``G_i``.  The reads ``x_t = a_t^T S_{t-1}`` of a chunk are
    ``x = T (A_ak V + (a exp(G_{i-1})) S_0)`` with ``T = (I + L)^-1``.

    Parameters
    ----------
    a, b : torch.Tensor, shape ``(..., C, D)``
        For RWKV-7 ``a = -kk`` and ``b = kk * lr``, with kk the unit removal
        key and lr in (0, 1) its in-context learning rate.
    g : torch.Tensor, shape ``(..., C, D)`` or ``(..., C)``
        Log decay, ``<= 0``; for RWKV-7 ``-exp(w)`` of the published code or
        ``-0.6065 sigmoid(w)``.

    Returns
    -------
    torch.Tensor
        Shape ``(..., C, C)``, dtype of ``a``, rounded as in `from_keys`.  Other libraries write
        ``(I - A_ab)^-1``: L is ``-A_ab``.

    References
    ----------
    RWKV-7, arXiv 2503.14456, section 4; DeltaNet, arXiv 2406.06484, section 3.
    """
    reads, writes, g = _wide(a, b, g)
    total, axis = cumulative(g, reads), a.ndim - 2
    # This is a shift and not G - g, which would round up and down.
    before = torch.roll(total, 1, axis)
    before.select(axis, 0).zero_()
    with torch.autocast(a.device.type, enabled=False):
        lower = torch.tril(decayed_products(-reads, writes, total, before), -1)
    return lower if lower.dtype == a.dtype else lower.to(a.dtype)


def _wide(*inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return inputs in one type of at least 32 bits: sums of 64 decays lose most of what 16 bits hold."""
    wide = reduce(torch.promote_types, (x.dtype for x in inputs), torch.float32)
    # A conversion that changes nothing would be a node of a trace.
    return [x if x.dtype == wide else x.to(wide) for x in inputs]


def cumulative(g: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``G = cumsum(g)`` along the chunk, for one decay per row or per channel of ``k``.

    Raises
    ------
    InputError
        If ``g`` has neither the shape of ``k`` nor that of its rows.
    """
    if g.shape not in (k.shape, k.shape[:-1]):
        raise InputError(
            f"g has shape {list(g.shape)}; keys {list(k.shape)} take one log decay per row, "
            f"{list(k.shape[:-1])}, or one per channel"
        )
    return torch.cumsum(g, k.ndim - 2)


def decayed_products(
    left: torch.Tensor, right: torch.Tensor, total: torch.Tensor, read: torch.Tensor | None = None
) -> torch.Tensor:
    """``sum_d left_i[d] right_j[d] exp(R_i[d] - G_j[d])`` for ``j <= i``; the rest is not defined.

    Parameters
    ----------
    left, right : torch.Tensor, shape ``(..., C, D)``
    total : torch.Tensor, shape ``(..., C)`` or ``(..., C, D)``
        G, falling along the chunk.
    read : torch.Tensor, optional
        R, of G's shape, ``G_i <= R_i <= G_{i-1}``; G by default, as for a state that is
        read after its decay.  With another R the diagonal is also not defined.
    """
    rows = total if read is None else read
    diagonal = 0 if read is None else -1
    if total.ndim < left.ndim:
        return left @ right.mT * _decays(rows, total, diagonal)
    return _by_halves(left, right, total, rows, diagonal)


def _decays(rows: torch.Tensor, total: torch.Tensor, diagonal: int) -> torch.Tensor:
    # Mask before exp: above the diagonal the difference is positive and may overflow.
    return torch.exp(torch.tril(rows.unsqueeze(-1) - total.unsqueeze(-2), diagonal))


def _by_halves(
    left: torch.Tensor, right: torch.Tensor, total: torch.Tensor, rows: torch.Tensor, diagonal: int
) -> torch.Tensor:
    """Double the diagonal blocks; the block below each pair of them is one product over a pivot.

    This needs only the memory of the result: the differences of all pairs would take D times as much.
    """
    size = left.shape[-2]
    # It starts from the odd part of the size, which is 1 for the sizes of models.
    width = size // (size & -size)
    tiles = [_tiles(x, width) for x in (left, right, total, rows)]
    blocks = _direct(tiles[0], tiles[1], tiles[2], tiles[3], diagonal)
    while width < size:
        below = _below(*(_tiles(x, 2 * width) for x in (left, right, total, rows)))
        upper, lower = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
        upper, lower = torch.cat([upper, torch.zeros_like(upper)], -1), torch.cat([below, lower], -1)
        blocks = torch.cat([upper, lower], -2)
        width *= 2
    return blocks.squeeze(-3)


def _below(left: torch.Tensor, right: torch.Tensor, total: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Products of the lower half of a block's rows with the upper half of its columns."""
    half = left.shape[-2] // 2
    # The last G of the upper half lies between all G that meet here: both factors are <= 1.
    pivot = total[..., half - 1 : half, :]
    writers = right[..., :half, :] * torch.exp(pivot - total[..., :half, :])
    readers = left[..., half:, :] * torch.exp(rows[..., half:, :] - pivot)
    return readers @ writers.mT


def _tiles(x: torch.Tensor, width: int) -> torch.Tensor:
    """``(..., C, D)`` to ``(..., C / width, width, D)``."""
    return x.reshape(*x.shape[:-2], -1, width, x.shape[-1])


def _direct(
    left: torch.Tensor, right: torch.Tensor, total: torch.Tensor, rows: torch.Tensor, diagonal: int
) -> torch.Tensor:
    # As in _decays: mask before exp.
    size = left.shape[-2]
    above = torch.ones(size, size, dtype=torch.bool, device=left.device).triu(diagonal + 1)
    gaps = (rows.unsqueeze(-2) - total.unsqueeze(-3)).masked_fill(above.unsqueeze(-1), 0.0)
    return (left.unsqueeze(-2) * right.unsqueeze(-3) * torch.exp(gaps)).sum(-1)
