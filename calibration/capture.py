"""Streams the triangular systems of a model's delta-rule layers, without keeping activations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch

from qinvert.calibration.data.token_batches import token_batches
from qinvert.calibration.data.token_data import with_options
from qinvert.calibration.patching import forward, patched_by_layer
from qinvert.checks import check_member, check_seed
from qinvert.delta_rule.chunks import DeltaChunks
from qinvert.errors import InputError
from qinvert.matrices import SolvedInverse
from qinvert.pretrained import opened


class Detail(StrEnum):
    """What `capture_details` can keep beside L."""

    #: beta, ``[batch, heads, chunks, C]``.
    BETA = "beta"
    #: ``<k_i, k_j>``, ``[batch, heads, chunks, C, C]``.
    GRAM = "gram"
    #: ``beta v`` and ``beta k exp(G)``, ``[batch, heads, chunks, C, D]``: what T is multiplied with.
    RIGHT_HAND_SIDES = "right_hand_sides"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Captured:
    """The systems of one layer in one forward pass; what was not asked for is None."""

    #: Name of the layer's module.
    layer: str
    #: L, ``[batch, heads, chunks, C, C]``.
    lower: torch.Tensor
    #: See `Detail.BETA`.
    beta: torch.Tensor | None = None
    #: See `Detail.GRAM`.
    gram: torch.Tensor | None = None
    #: See `Detail.RIGHT_HAND_SIDES`.
    right_hand_sides: tuple[torch.Tensor, torch.Tensor] | None = None


def capture(
    model: torch.nn.Module | str | PathLike[str],
    data: Any,
    *,
    share: float = 1.0,
    seed: int = 0,
    num_samples: int | None = None,
    seq_len: int | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream ``(layer, L)`` from the model's forward passes over ``data``.

    Only the matrices of one batch are held at a time.

    Parameters
    ----------
    model, data, share, seed, num_samples, seq_len
        See `capture_details`.

    Yields
    ------
    tuple
        The layer's name and L ``[batch, heads, chunks, C, C]``.
    """
    tokens = with_options(data, num_samples, seq_len, seed)
    for item in capture_details(model, tokens, share=share, seed=seed):
        yield item.layer, item.lower


def capture_details(
    model: torch.nn.Module | str | PathLike[str],
    data: Any,
    *,
    details: Collection[str] = (),
    share: float = 1.0,
    seed: int = 0,
    num_samples: int | None = None,
    seq_len: int | None = None,
) -> Iterator[Captured]:
    """Stream every layer's systems, batch by batch.

    Parameters
    ----------
    model : torch.nn.Module or path
        A Hugging Face model, or its folder, of one of `qinvert.calibration.patching.FAMILIES`.
    data
        See `qinvert.calibration.data.token_batches.token_batches`.
    details : collection of str
        What to keep beside L, see `Detail`.
    share : float
        Share of the chunks to keep, at least one per batch.  The same positions
        are kept in all sequences, heads and layers of a batch.
    seed : int
        Seed of the choice of chunks and of sequences.
    num_samples, seq_len : int, optional
        How many sequences of ``data`` to read, and how many tokens each of
        them has; see `qinvert.TokenData`.

    Raises
    ------
    InputError
        If an option, the model or a batch is not legal, see
        `qinvert.patched`.
    """
    loaded = opened(model)
    wanted = frozenset(check_member(Detail, "detail", name, InputError) for name in details)
    tokens = with_options(data, num_samples, seq_len, seed)
    sample = ChunkSample(share=share, seed=seed)
    for index, batch in enumerate(token_batches(tokens, loaded)):
        yield from capture_batch(loaded, batch, wanted, partial(sample.positions, index))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSample:
    """Which chunks of a batch are kept: the same share of every batch, at random positions."""

    #: In (0, 1].
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.share, (int, float)) and not isinstance(self.share, bool)
        if not number or not 0 < self.share <= 1:
            raise InputError(f"share {self.share!r} is not in (0, 1]; pass 0.1 to keep a tenth of the chunks")
        check_seed(self.seed, InputError)

    def positions(self, batch: int, count: int) -> torch.Tensor | None:
        """Return the positions to keep among ``count`` chunks of a batch, ascending; None means all."""
        if self.share == 1:
            return None
        kept = max(1, round(self.share * count))
        # Each batch has its own random stream, so that the choice does not depend on the batches before.
        generator = np.random.default_rng((self.seed, batch))
        return torch.from_numpy(np.sort(generator.choice(count, kept, replace=False)))


def capture_batch(
    model: torch.nn.Module,
    batch: dict[str, Any],
    details: Collection[Detail] = (),
    positions: Callable[[int], torch.Tensor | None] = lambda _: None,
) -> list[Captured]:
    """Return the systems of every layer in one forward pass; ``positions(chunks)`` are kept."""
    found: list[Captured] = []

    def record(layer: str, chunks: DeltaChunks) -> SolvedInverse:
        lower = chunks.lower
        kept = positions(lower.shape[2])
        found.append(_captured(layer, lower, chunks, details, kept))
        return SolvedInverse(lower)

    with patched_by_layer(model, record):
        # L needs no logits, so that a model without a head will do.
        forward(model, batch)
    return found


def _captured(
    layer: str,
    lower: torch.Tensor,
    chunks: DeltaChunks,
    details: Collection[Detail],
    kept: torch.Tensor | None,
) -> Captured:
    def pick(x: torch.Tensor) -> torch.Tensor:
        return x if kept is None else x[:, :, kept.to(x.device)]

    values, keys = chunks.right_hand_sides if Detail.RIGHT_HAND_SIDES in details else (None, None)
    return Captured(
        layer=layer,
        lower=pick(lower),
        beta=pick(chunks.beta) if Detail.BETA in details else None,
        gram=pick(chunks.gram) if Detail.GRAM in details else None,
        right_hand_sides=None if values is None or keys is None else (pick(values), pick(keys)),
    )
