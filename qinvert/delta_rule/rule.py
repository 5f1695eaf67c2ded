"""The chunked gated delta rule with a pluggable triangular inverse.

This is our own implementation, with the signature that Hugging Face models call,
so that it can replace theirs: one decay per head (Gated DeltaNet) or one per
channel (Kimi Delta Attention).  All arithmetic is float32.

RWKV-7 and other recurrences with a diagonal plus a low-rank term need the same
inverse; `from_dplr` builds their L.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad

from qinvert.delta_rule.chunks import Applied, ChunkInverse, DeltaChunks
from qinvert.delta_rule.from_keys import from_dplr as from_dplr
from qinvert.delta_rule.from_keys import from_keys as from_keys
from qinvert.errors import InputError
from qinvert.matrices import SolvedInverse, solve
from qinvert.program.steps import NORM_EPSILON

#: ``inverse(L) -> T`` over ``[batch, heads, chunks, C, C]``.
Inverse = Callable[[torch.Tensor], Applied]


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
    inverse: Inverse = SolvedInverse,
    chunk_inverse: ChunkInverse | None = None,
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

    With one decay per channel, ``diag(exp(g_t))`` takes the place of ``exp(g_t)``,
    and every product of keys and queries is
    ``sum_d k_i[d] k_j[d] exp(G_i[d] - G_j[d])``.

    Parameters
    ----------
    query, key : torch.Tensor, shape ``[B, T, Hk, Dk]``
        Queries are scaled by ``Dk ** -0.5`` here; heads are repeated to ``H`` if there are fewer.
    value : torch.Tensor, shape ``[B, T, H, Dv]``
    g : torch.Tensor, shape ``[B, T, H]`` or ``[B, T, H, Dk]``
        Log decay of each head, or of each of its channels, ``<= 0``.
    beta : torch.Tensor, shape ``[B, T, H]``
    chunk_size : int
        C; the sequence is padded with zeros to a multiple of it.
    initial_state : torch.Tensor, optional, shape ``[B, H, Dk, Dv]``
    output_final_state : bool
    use_qk_l2norm_in_kernel : bool
        Normalize queries and keys first.
    inverse : callable
        ``inverse(L) -> T`` over ``[B, H, N, C, C]`` float32; by default T is not
        formed: U and W come from two solves.
    chunk_inverse : callable, optional
        ``chunk_inverse(chunks) -> T`` instead, for inverses that need more than L.

    Returns
    -------
    tuple
        Output ``[B, T, H, Dv]`` in the query's dtype, and the final state
        ``[B, H, Dk, Dv]`` in float32 or None.

    Raises
    ------
    InputError
        If shapes do not fit, or sequences are packed with ``cu_seqlens``.

    References
    ----------
    Gated DeltaNet, arXiv 2412.06464, section 3.3; Kimi Linear, arXiv 2510.26692, section 3.
    """
    if cu_seqlens is not None:
        raise InputError("packed sequences (cu_seqlens) are not supported; pass one sequence per row")
    _check_shapes(query, key, value, g, beta, chunk_size, initial_state)
    # Autocast would run the float32 products below in 16 bits.
    with torch.autocast(query.device.type, enabled=False):
        chunks = _cut(query, key, value, g, beta, chunk_size, initial_state, use_qk_l2norm_in_kernel)
        t = inverse(chunks.lower) if chunk_inverse is None else chunk_inverse(chunks)
        result = chunks.apply(applicable(t, chunks))
    out = result.out.flatten(2, 3)[:, :, : query.shape[1]].transpose(1, 2).to(query.dtype)
    return out.contiguous(), result.state if output_final_state else None


def _cut(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    size: int,
    state: torch.Tensor | None,
    normalize: bool,
) -> DeltaChunks:
    heads = value.shape[2]
    q, k = (_by_head(_repeat_heads(x, heads)) for x in (query, key))
    if normalize:
        q, k = _normalize(q), _normalize(k)
    k, v = _chunks(k, size), _chunks(_by_head(value), size)
    if state is None:
        state = v.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    return DeltaChunks(
        q=_chunks(q * query.shape[-1] ** -0.5, size),
        k=k,
        v=v,
        g=_chunks(_by_head(g), size),
        beta=_chunks(_by_head(beta), size),
        state=state.to(torch.float32),
    )


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
    legal = query.ndim == key.ndim == value.ndim == 4 and query.shape == key.shape
    legal = legal and beta.shape == value.shape[:3] and key.shape[:2] == value.shape[:2]
    legal = legal and g.shape in (beta.shape, (*beta.shape, key.shape[-1]))
    if not legal or value.shape[1] == 0 or value.shape[2] % max(1, key.shape[2]):
        raise InputError(
            f"{shapes} do not fit; pass query, key [B, T, Hk, Dk], value [B, T, H, Dv], "
            "beta [B, T, H], g [B, T, H] or [B, T, H, Dk] with T > 0 and H a multiple of Hk"
        )
    if chunk_size < 1:
        raise InputError(f"chunk_size {chunk_size} is not positive; models use 64")
    wanted = (value.shape[0], value.shape[2], key.shape[3], value.shape[3])
    if state is not None and state.shape != wanted:
        raise InputError(f"initial_state has shape {list(state.shape)}; pass {list(wanted)}")


def applicable(t: Any, chunks: DeltaChunks) -> Applied:
    """Return the result of an inverse, in float32 if it is a tensor.

    Raises
    ------
    InputError
        If it is not a T for these chunks.
    """
    if isinstance(t, SolvedInverse):
        return t
    wanted = [*chunks.beta.shape, chunks.beta.shape[-1]]
    if not isinstance(t, torch.Tensor) or list(t.shape) != wanted:
        given = list(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__
        raise InputError(f"inverse(L) returned {given}; return a tensor of L's shape {wanted}")
    return t.to(torch.float32)


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """``[B, T, H, ...]`` to float32 ``[B, H, T, ...]``."""
    # Models also copy only where the type changes: strides decide in which order norms add up.
    return x.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.repeat_interleave(heads // x.shape[2], dim=2) if x.shape[2] != heads else x


def _normalize(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPSILON)


def _chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """``[B, H, T, ...]`` to ``[B, H, N, size, ...]``, zero-padded at the end."""
    missing = -x.shape[2] % size
    x = pad(x, (0, 0) * (x.ndim - 3) + (0, missing))
    return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])
