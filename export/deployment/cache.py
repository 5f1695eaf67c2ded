"""The cache that a model fills in one call of a deployed graph: tensors come in and go out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from qinvert.errors import ExportError
from qinvert.export.deployment.states import StateKind, Traffic


@dataclass(slots=True)
class Layer:
    """What models look for in a layer of a cache."""

    #: Positions of the tokens before, which a window does not ask for.
    indexer_position_ids: torch.Tensor | None = None


class WindowCache:
    """Takes every state of a `Traffic`, and gives it the next one; no position in it is computed.

    Caches of attention layers move to the left: new tokens enter at the right end, and the oldest
    fall out.  Keys hold their rotation, so that their place in a cache means nothing.

    Parameters
    ----------
    traffic : Traffic
    valid : torch.Tensor or None, float32 ``[1, T]``
        1 for the tokens that count; None where all do.
    first : torch.Tensor, int32 ``[1]``
        Position of the first token of the window.
    positions : torch.Tensor, int32 ``[1, T]``
        Positions of all its tokens.
    """

    is_compileable = True

    def __init__(
        self, traffic: Traffic, valid: torch.Tensor | None, first: torch.Tensor, positions: torch.Tensor
    ) -> None:
        self.traffic, self.valid = traffic, valid
        self.first, self.positions = first, positions
        #: What models keep in the layers of a cache.
        self.layers: Mapping[int, Layer] = defaultdict(Layer)
        self._entries: dict[int, torch.Tensor] = {}

    @property
    def counted(self) -> torch.Tensor:
        """1 for the tokens that count, float32 ``[1, T]``."""
        if self.valid is None:
            return torch.ones(self.positions.shape, dtype=torch.float32)
        return self.valid

    def entries(self, blocks: torch.Tensor, size: int) -> torch.Tensor:
        """Block of the token in every entry of the caches and the window, int32 ``[cache + T]``.

        Parameters
        ----------
        blocks : torch.Tensor, int32 ``[T]``
            Those of the tokens of the window.
        size : int
            Tokens of a block; layers with the same one share a state.
        """
        if size not in self._entries:
            before = self.traffic.take(StateKind.ENTRIES, (self.traffic.cache,), None, size)
            self._entries[size] = torch.cat([before, blocks])
            self.traffic.give(StateKind.ENTRIES, self._entries[size][len(blocks) :], None, size)
        return self._entries[size]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values, those of the cache first."""
        both = []
        for kind, new in ((StateKind.KEYS, keys), (StateKind.VALUES, values)):
            shape = (*new.shape[:2], self.traffic.cache, new.shape[3])
            if not new.shape[3]:
                # Rotations of latent keys in models without rotation.
                both.append(torch.zeros(*shape[:2], shape[2] + new.shape[2], 0, dtype=new.dtype))
                continue
            whole = torch.cat([self.traffic.take(kind, shape, layer), new], 2)
            self.traffic.give(kind, whole[:, :, new.shape[2] :], layer)
            both.append(whole)
        return both[0], both[1]

    def update_conv_state(
        self,
        inputs: torch.Tensor,
        layer: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Return the inputs of a convolution behind those of the last call that it still needs.

        Raises
        ------
        ExportError
            If a model keeps token ids there, whose n-grams it hashes.
        """
        if inputs.ndim != 3:
            raise ExportError(
                "the model looks up embeddings of n-grams by a hash of 64-bit integers (ple_layer_ids), "
                "which NPUs do not compute; deploy takes models without it, and qinvert.export writes layers"
            )
        kept = (conv_kernel_size or 1) - 1
        before = self.traffic.take(StateKind.CONVOLUTION, (*inputs.shape[:2], kept), layer, state_idx)
        whole = torch.cat([before, inputs], 2)
        last = whole[:, :, inputs.shape[2] :]
        if self.valid is not None:
            last = whole @ convolution_tail(self.valid, kept)
        self.traffic.give(StateKind.CONVOLUTION, last, layer, state_idx)
        return whole

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        """None, so that models take the path of several tokens, which `update_conv_state` serves."""

    def get_recurrent_state(self, *_: Any, **__: Any) -> None:
        """None, so that models call the delta rule of chunks, which takes the state from the traffic."""

    def update_recurrent_state(self, state: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return the state; the delta rule has handed it on."""
        return state

    def is_recording_past(self, *_: Any) -> bool:
        """False: nothing is taken back."""
        return False

    def has_previous_state(self, *_: Any) -> bool:
        """False, as if every window were the first."""
        return False

    def update_indexer(self, *_: Any, **__: Any) -> NoReturn:
        """What sparse attention of a kind that `qinvert.export.deployment.indexers` does not know calls.

        Raises
        ------
        ExportError
            Always.
        """
        raise ExportError(
            "the model has sparse attention of a kind that deploy does not know; it knows those of "
            "qwen4_exp and glm5_next, and qinvert.export_model writes the prefill of others"
        )

    def get_seq_length(self, *_: Any) -> int:
        """0: positions are given."""
        return 0


def is_zero(x: torch.Tensor) -> torch.Tensor:
    """``relu(1 - |x|)``: 1 where a whole number is 0, and 0 elsewhere, without comparison or selection."""
    return torch.relu(1.0 - x.abs())


def convolution_tail(valid: torch.Tensor, kept: int) -> torch.Tensor:
    """Select the last ``kept`` of the inputs behind n valid tokens: ``E[t, j] = 1`` at ``t = n + j``.

    See `is_zero`.

    Parameters
    ----------
    valid : torch.Tensor, shape ``[1, T]``
        1 for the first n tokens.
    kept : int

    Returns
    -------
    torch.Tensor, shape ``[T + kept, kept]``
    """
    places = torch.arange(valid.shape[1] + kept)[:, None] - torch.arange(kept)[None]
    return is_zero(places.to(torch.float32) - valid.sum(1, keepdim=True))
