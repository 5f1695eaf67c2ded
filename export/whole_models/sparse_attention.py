"""Sparse attention that a trace can follow: the selection of qwen4_exp without a loop over tokens.

The model's own code visits every query and asks in Python which tokens it
sees.  The same selection for all queries at once is a few tensor operations.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import torch

from qinvert.export.whole_models.method_replacement import replace_method

#: What tells an indexer of this kind: its projection, and how many blocks of how many tokens it takes.
ATTRIBUTES: Final = ("index_qk_proj", "block_topk", "compress_ratio")


@contextmanager
def traceable_indexers(model: torch.nn.Module) -> Iterator[None]:
    """Have every indexer of qwen4_exp select by `selected_tokens`, inside a ``with`` block."""
    with ExitStack() as undo:
        for module in model.modules():
            if all(hasattr(module, name) for name in ATTRIBUTES):
                replace_method(undo, module, "forward", partial(_forward, module))
        yield


def selected_tokens(
    visible: torch.Tensor, size: int, count: int, score: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Tokens that each query attends to: those of its best blocks, and of the block that is not full yet.

    Token j of a sequence is in block ``floor(r_j / size)``, where r_j counts
    the tokens before it that are not padding.  A query takes the ``count``
    highest scores among the blocks that it sees whole; of equal ones the
    first, where `torch.topk` does so.

    Parameters
    ----------
    visible : torch.Tensor, shape ``[B, T, T]``, bool
        Whether query t sees token j: every token up to t that is not padding.
    size : int
        Tokens of a block.
    count : int
        Blocks that a query takes.
    score : callable
        Given the tokens of every block ``[B, N, size]``, returns the score of
        each for each query ``[B, T, N]``.

    Returns
    -------
    torch.Tensor, shape ``[B, T, T]``, bool
    """
    # The last query sees every token that there is.
    real = visible[:, -1]
    rank = real.cumsum(-1) - 1
    blocks = (rank.shape[-1] + size - 1) // size
    at = torch.where(real, rank, blocks * size)
    positions = torch.arange(rank.shape[-1], device=rank.device).expand_as(rank)
    tokens = rank.new_zeros(rank.shape[0], blocks * size + 1).scatter(-1, at, positions)[:, :-1]
    whole = (visible.sum(-1) // size)[..., None]
    scores = score(tokens.reshape(-1, blocks, size))
    seen = torch.arange(blocks, device=rank.device) < whole
    # So many more blocks, which no query sees, make sure that there are enough to choose from.
    lowest = torch.finfo(scores.dtype).min
    padded = torch.nn.functional.pad(scores.masked_fill(~seen, lowest), (0, count), value=lowest)
    best = padded.topk(count, dim=-1).indices
    chosen = torch.zeros_like(padded, dtype=torch.bool).scatter(-1, best, True)
    block = (rank.clamp(min=0) // size)[:, None].expand_as(visible)
    return visible & (chosen.gather(-1, block) | (block >= whole))


def projected(
    indexer: Any, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
) -> tuple[Callable[..., Any], torch.Tensor, torch.Tensor]:
    """Return how an indexer of qwen4_exp rotates, its rotated queries, and the key of every token.

    Parameters
    ----------
    indexer : torch.nn.Module
    hidden_states : torch.Tensor, shape ``[B, T, W]``
    position_embeddings : tuple of torch.Tensor
        Cosines and sines of every token.

    Returns
    -------
    tuple
        ``rotate(x, cos=, sin=, unsqueeze_dim=)``, queries ``[B, T, H, D]`` and keys ``[B, T, D]``.
    """
    rotate = vars(sys.modules[type(indexer).__module__])["apply_rotary_pos_emb"]
    cos, sin = position_embeddings
    heads = indexer.index_qk_proj(hidden_states).unflatten(-1, (-1, indexer.index_head_dim))
    query = rotate(indexer.q_layernorm(heads[:, :, :-1]), cos=cos, sin=sin, unsqueeze_dim=2)
    return rotate, query, heads[:, :, -1]


def _forward(
    indexer: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor,
    _cache: None = None,
) -> torch.Tensor:
    rotate, query, key = projected(indexer, hidden_states, position_embeddings)
    cos, sin = position_embeddings

    def score(tokens: torch.Tensor) -> torch.Tensor:
        # Not len(): that would fix the batch.
        rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
        first = tokens[..., 0]
        pooled = indexer.k_layernorm(key[rows[..., None], tokens].float().mean(2).to(key.dtype))
        turned = rotate(pooled[:, :, None], cos=cos[rows, first], sin=sin[rows, first], unsqueeze_dim=2)
        products: torch.Tensor = torch.einsum("bthd,bnd->btnh", query.float(), turned[:, :, 0].float())
        return products.relu().sum(-1) / math.sqrt(indexer.index_head_dim)

    visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    return selected_tokens(visible[:, 0], indexer.compress_ratio, indexer.block_topk, score)[:, None]
