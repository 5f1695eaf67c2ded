"""Sparse attention of qwen4_exp and glm5_next in a window: what their indexers score, and what is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import torch

from qinvert.errors import ExportError
from qinvert.export.deployment.blocks import BlockSizes, block_keys, visible_entries
from qinvert.export.deployment.cache import WindowCache
from qinvert.export.whole_models.method_replacement import replace_method
from qinvert.export.whole_models.sparse_attention import ATTRIBUTES as QWEN
from qinvert.export.whole_models.sparse_attention import projected

#: What tells an indexer of glm5_next.
GLM: Final = ("wq_b", "weights_proj", "index_kpool_compress_gate")
#: Method of its attention layers that makes a mask of what an indexer returns.
MASK: Final = "build_attention_mask_from_topk"


def indexers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the indexers of a model that deploy knows."""
    return (module for module in model.modules() if _is(module, QWEN) or _is(module, GLM))


def by_layer_kind(mask: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Return a mask as models with indexers take it.

    Attention gets true where nothing is added to a score, and layers with states get none.
    """
    return {"indexed_attention": mask == 0, "linear_attention": None}


@contextmanager
def window_indexers(model: torch.nn.Module, positions: int) -> Iterator[None]:
    """Have indexers choose by `qinvert.export.deployment.blocks`, inside a ``with`` block.

    They return what a query attends to, as a mask of the entries of a cache and a window.  Where
    the budget of an indexer covers all ``positions``, that is the mask that it was given.

    Raises
    ------
    ExportError
        If an indexer leaves out tokens of the block that is not full.
    """
    with ExitStack() as undo:
        for module in indexers(model):
            replace_method(undo, module, "forward", _forward_of(module, positions))
        for module in model.modules():
            if hasattr(module, MASK):
                replace_method(undo, module, MASK, _chosen_mask)
        yield


def _is(module: torch.nn.Module, attributes: tuple[str, ...]) -> bool:
    return all(hasattr(module, name) for name in attributes)


def _forward_of(module: Any, positions: int) -> Callable[..., torch.Tensor]:
    if _is(module, QWEN):
        sizes = BlockSizes(tokens=module.compress_ratio, chosen=module.block_topk, positions=positions)
        return partial(_qwen, module, sizes)
    if not module.index_kpool_always_select_tail:
        raise ExportError(
            "the indexer leaves out tokens of the block that is not full "
            "(index_kpool_always_select_tail is false), so that the first tokens attend to nothing; "
            "deploy takes models that keep them"
        )
    chosen = module.index_topk // module.index_kpool
    sizes = BlockSizes(tokens=module.index_kpool, chosen=chosen, positions=positions)
    return partial(_glm, module, sizes)


def _qwen(
    indexer: Any,
    sizes: BlockSizes,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor,
    past_key_values: WindowCache,
) -> torch.Tensor:
    """Choose by ``sum_h relu(<q_h, k>) / sqrt(D)``, with k the mean of a block's keys.

    It is turned as the block's first token, whose cosines and sines go with the keys.
    """
    if sizes.takes_all:
        return attention_mask
    rotate, query, key = projected(indexer, hidden_states, position_embeddings)
    cos, sin = position_embeddings
    width, turns = indexer.index_head_dim, cos.shape[-1]

    def pool(inputs: torch.Tensor) -> torch.Tensor:
        first = inputs[:, :, 0]
        first_cos, first_sin = first[..., width : width + turns], first[..., width + turns :]
        pooled = indexer.k_layernorm(inputs[..., :width].mean(2))
        turned: torch.Tensor = rotate(pooled[:, :, None], cos=first_cos, sin=first_sin, unsqueeze_dim=2)
        return turned[:, :, 0]

    inputs = torch.cat([key, cos, sin], -1)
    keys = block_keys(past_key_values, indexer.layer_idx, inputs, sizes, pool)
    scores = torch.relu(_products(query, keys)).sum(2) / math.sqrt(width)
    return attention_mask & visible_entries(past_key_values, scores, sizes)


def _glm(
    indexer: Any,
    sizes: BlockSizes,
    hidden_states: torch.Tensor,
    q_resid: torch.Tensor,
    attention_mask: torch.Tensor,
    past_key_values: WindowCache,
) -> torch.Tensor:
    """Choose by ``sum_h w_h relu(<q_h, k>)``, where k is a mean of a block's keys that gates weight."""
    if sizes.takes_all:
        return attention_mask
    width = indexer.head_dim
    query = indexer.wq_b(q_resid).unflatten(-1, (-1, width))
    key = indexer.k_norm(indexer.wk(hidden_states))
    gates = torch.nn.functional.linear(hidden_states, indexer.index_kpool_compress_gate)

    def pool(inputs: torch.Tensor) -> torch.Tensor:
        shares = torch.softmax(inputs[..., width:] + indexer.index_kpool_compress_ape, 2)
        return (shares * inputs[..., :width]).sum(2)

    keys = block_keys(past_key_values, indexer.layer_idx, torch.cat([key, gates], -1), sizes, pool)
    weights = indexer.weights_proj(hidden_states) * indexer.n_heads**-0.5
    products = torch.relu(_products(query, keys) * indexer.softmax_scale)
    scores = (weights[:, :, None] @ products)[:, :, 0]
    return attention_mask & visible_entries(past_key_values, scores, sizes)


def _products(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``<q[t, h], k[n]>``, float32 ``[1, T, H, N]``, of queries ``[1, T, H, D]`` and keys ``[1, N, D]``."""
    flat = query.reshape(1, -1, query.shape[3]) @ keys.transpose(1, 2)
    return flat.reshape(*query.shape[:3], keys.shape[1])


def _chosen_mask(*, topk_indices: torch.Tensor, **_: Any) -> torch.Tensor:
    """Return what a replaced indexer returns: it is the mask."""
    return topk_indices
