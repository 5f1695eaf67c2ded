"""The chunked gated delta rule with a pluggable triangular inverse.

Our own implementation, with the signature that Hugging Face models call, so
that it can stand in for theirs.  All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad

from qinvert.errors import InputError
from qinvert.matrices import solve
from qinvert.stress import from_keys

#: ``inverse(L) -> T`` over ``[batch, heads, chunks, C, C]``.
Inverse = Callable[[torch.Tensor], torch.Tensor]
#: ``inverse(L, beta) -> T``, beta ``[batch, heads, chunks, C]``.
InverseWithBeta = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
#: Added to the squared norm of queries and keys, as the models do.
NORM_EPSILON = 1e-6


def exact(lower: torch.Tensor) -> torch.Tensor:
    """``T = (I + L)^-1`` by a float64 solve, rounded to L's dtype."""
    return solve(lower).to(lower.dtype)


def chunk_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    inverse: Inverse = exact,
    inverse_with_beta: InverseWithBeta | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T``, ``o_t = S_t q_t``, by chunks.

    Per chunk of C tokens, with ``G = cumsum(g)`` and ``T = (I + L)^-1``:

        L[i, j] = beta_i <k_i, k_j> exp(G_i - G_j)            (j < i)
        U = T (beta v),   W = T (beta k exp(G))
        V = U - W S
        O = (q exp(G)) S + tril(q k^T exp(G_i - G_j)) V
        S <- exp(G_C) S + (k exp(G_C - G))^T V

    Parameters
    ----------
    query, key : torch.Tensor, shape ``[B, T, Hk, Dk]``
        Queries are scaled by ``Dk ** -0.5`` here; heads repeat to ``H`` if fewer.
    value : torch.Tensor, shape ``[B, T, H, Dv]``
    g : torch.Tensor, shape ``[B, T, H]``
        Log decay of each head, ``<= 0``.
    beta : torch.Tensor, shape ``[B, T, H]``
    chunk_size : int
        C; the sequence is padded with zeros to a multiple of it.
    initial_state : torch.Tensor, optional, shape ``[B, H, Dk, Dv]``
    output_final_state : bool
    use_qk_l2norm_in_kernel : bool
        Normalize queries and keys first.
    inverse : callable
        ``inverse(L) -> T`` over ``[B, H, N, C, C]`` float32.
    inverse_with_beta : callable, optional
        ``inverse_with_beta(L, beta) -> T``, beta ``[B, H, N, C]``, instead.

    Returns
    -------
    tuple
        Output ``[B, T, H, Dv]`` in the query's dtype, and the final state
        ``[B, H, Dk, Dv]`` in float32 or None.

    Raises
    ------
    InputError
        If ``g`` is per channel (this rule has one decay a head), or sequences
        are packed with ``cu_seqlens``.

    References
    ----------
    Gated DeltaNet, arXiv 2412.06464, section 3.3.
    """
    if cu_seqlens is not None:
        raise InputError("packed sequences (cu_seqlens) are not supported; pass one sequence a row")
    _check_shapes(query, key, value, g, beta, chunk_size, initial_state)
    length, dtype = query.shape[1], query.dtype
    heads = value.shape[2]
    # Autocast would run the float32 products below in 16 bits.
    with torch.autocast(query.device.type, enabled=False):
        if use_qk_l2norm_in_kernel:
            query, key = _normalize(query), _normalize(key)
        q, k = (_chunks(_repeat_heads(x, heads), chunk_size) for x in (query, key))
        v = _chunks(value, chunk_size)
        log_decay, b = (_chunks(x.unsqueeze(-1), chunk_size).squeeze(-1) for x in (g, beta))
        q = q * query.shape[-1] ** -0.5
        lower = from_keys(k, b, log_decay)
        found = inverse(lower) if inverse_with_beta is None else inverse_with_beta(lower, b)
        t = _checked(found, lower)
        state = _initial_state(initial_state, k, v)
        out, state = _scan(q, k, v, torch.cumsum(log_decay, -1), b, t, state)
    out = out.flatten(2, 3)[:, :, :length].transpose(1, 2).to(dtype)
    return out.contiguous(), state if output_final_state else None


def _check_shapes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int,
    state: torch.Tensor | None,
) -> None:
    shapes = ", ".join(
        f"{name} {list(x.shape)}"
        for name, x in (("query", query), ("key", key), ("value", value), ("g", g), ("beta", beta))
    )
    if g.ndim == 4:
        raise InputError(f"{shapes}: this rule takes one decay a head, not per channel")
    legal = query.ndim == key.ndim == value.ndim == 4 and query.shape == key.shape
    legal = legal and g.shape == beta.shape == value.shape[:3] and key.shape[:2] == value.shape[:2]
    if not legal or value.shape[1] == 0 or value.shape[2] % max(1, key.shape[2]):
        raise InputError(
            f"{shapes} do not fit; pass query, key [B, T, Hk, Dk], value [B, T, H, Dv], "
            "g, beta [B, T, H] with T > 0 and H a multiple of Hk"
        )
    if chunk_size < 1:
        raise InputError(f"chunk_size {chunk_size} is not positive; models use 64")
    wanted = (value.shape[0], value.shape[2], key.shape[3], value.shape[3])
    if state is not None and state.shape != wanted:
        raise InputError(f"initial_state has shape {list(state.shape)}, {list(wanted)} fits")


def _checked(t: Any, lower: torch.Tensor) -> torch.Tensor:
    if not isinstance(t, torch.Tensor) or t.shape != lower.shape:
        given = list(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__
        raise InputError(f"inverse(L) returned {given}; return a tensor of L's shape {list(lower.shape)}")
    return t.to(torch.float32)


def _scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    total: torch.Tensor,
    beta: torch.Tensor,
    t: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    growth = torch.exp(total).unsqueeze(-1)
    gap = torch.tril(total.unsqueeze(-1) - total.unsqueeze(-2))
    scores = torch.tril(q @ k.mT * torch.exp(gap))
    u = t @ (v * beta.unsqueeze(-1))
    w = t @ (k * beta.unsqueeze(-1) * growth)
    last = total[..., -1:]
    to_end = k * torch.exp(last - total).unsqueeze(-1)
    grown, decay = q * growth, torch.exp(last).unsqueeze(-1)
    outputs = []
    for n in range(q.shape[2]):
        fresh = u[:, :, n] - w[:, :, n] @ state
        outputs.append(grown[:, :, n] @ state + scores[:, :, n] @ fresh)
        state = state * decay[:, :, n] + to_end[:, :, n].mT @ fresh
    return torch.stack(outputs, dim=2), state


def _normalize(x: torch.Tensor) -> torch.Tensor:
    x = x.to(torch.float32)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPSILON)


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.repeat_interleave(heads // x.shape[2], dim=2) if x.shape[2] != heads else x


def _chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """``[B, T, H, D]`` to float32 ``[B, H, N, size, D]``, zero-padded at the end."""
    x = x.transpose(1, 2).to(torch.float32)
    x = pad(x, (0, 0, 0, -x.shape[2] % size))
    return x.reshape(*x.shape[:2], -1, size, x.shape[-1])


def _initial_state(state: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    if state is not None:
        return state.to(torch.float32)
    return v.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
