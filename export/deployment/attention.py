"""Attention and rotations of a window of tokens, without tensors of rank above 4."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import torch

from qinvert.export.whole_models.method_replacement import replace_method

#: Name under which transformers finds `attention`.
IMPLEMENTATION: Final = "qinvert_window"
#: What is added to scores of tokens that a query does not see: ``exp(-1000)`` is 0 in float32.
HIDDEN: Final = -1000.0


def attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """``softmax(scaling q k^T + mask) v``, with queries that share keys side by side.

    Parameters
    ----------
    query : torch.Tensor, shape ``[1, H, T, D]``
    key, value : torch.Tensor, shape ``[1, Hk, L, D]`` and ``[1, Hk, L, Dv]``
        H is a multiple of Hk.
    attention_mask : torch.Tensor, shape ``[1, 1, T, L]``
        What is added to the scores, or true for tokens that a query sees.

    Returns
    -------
    tuple
        Output ``[1, T, H, Dv]``, and None in place of the weights.
    """
    batch, heads, tokens, size = query.shape
    shared = heads // key.shape[1]
    factor = size**-0.5 if scaling is None else scaling
    # Reading keys once for all queries of a group is also less than repeating them.
    grouped = query.reshape(batch, key.shape[1], shared * tokens, size) * factor
    scores = grouped @ key.transpose(2, 3)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            attention_mask = added(attention_mask.to(torch.float32))
        scores = scores + torch.cat([attention_mask] * shared, 2)
    out = torch.softmax(scores, dim=-1) @ value
    return out.reshape(batch, heads, tokens, value.shape[-1]).transpose(1, 2), None


def window_mask(visible: torch.Tensor, valid: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    """What is added to the scores of a window: 0 for tokens that a query sees, else `HIDDEN`.

    Parameters
    ----------
    visible : torch.Tensor, shape ``[1, 1, 1, cache]``
        1 for entries of the cache that hold a token.
    valid : torch.Tensor, shape ``[1, 1, 1, T]``
        1 for tokens of the window that count.
    earlier : torch.Tensor, shape ``[1, 1, T, T]``
        1 on the diagonal and below it; as a constant, which a trace does not compute.

    Returns
    -------
    torch.Tensor, shape ``[1, 1, T, cache + T]``
    """
    ones = torch.ones(1, 1, earlier.shape[2], 1, dtype=torch.float32)
    seen = torch.cat([visible * ones, valid * earlier], 3)
    return added(seen)


def added(seen: torch.Tensor) -> torch.Tensor:
    """What is added to scores: 0 for what is seen, which is 1, else `HIDDEN`."""
    return (seen - 1.0) * -HIDDEN


@contextmanager
def window_attention(model: torch.nn.Module) -> Iterator[None]:
    """Have attention layers call `attention`, inside a ``with`` block."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention)
    with ExitStack() as undo:
        for module in model.modules():
            config = getattr(module, "config", None)
            before = getattr(config, "_attn_implementation", IMPLEMENTATION)
            if before != IMPLEMENTATION:
                undo.callback(setattr, config, "_attn_implementation", before)
                setattr(config, "_attn_implementation", IMPLEMENTATION)  # noqa: B010 - configurations are untyped
        yield


@contextmanager
def tabled_rotations(model: torch.nn.Module, positions: int) -> Iterator[None]:
    """Have rotary embeddings look up cosines and sines of ``positions`` positions, inside a ``with`` block.

    Chips that compute in 16 bits cannot hold the angle of a late position.
    """
    with ExitStack() as undo:
        for module in model.modules():
            if hasattr(module, "inv_freq") and hasattr(getattr(module, "config", None), "rope_parameters"):
                table = _table(module, positions)
                replace_method(undo, module, "forward", partial(_looked_up, table))
        yield


def _table(module: Any, positions: int) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return tuple(
            x[0].clone() for x in module(torch.zeros(1, dtype=torch.float32), torch.arange(positions)[None])
        )


def _looked_up(
    table: tuple[torch.Tensor, ...], _x: torch.Tensor, position_ids: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, ...]:
    # Text has the same position on every axis that a model may tell apart.
    at = position_ids.reshape(-1, position_ids.shape[-1])[0]
    return tuple(torch.index_select(x, 0, at)[None] for x in table)
