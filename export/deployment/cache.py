"""The cache that a model fills in one call of a deployed graph: tensors come in and go out."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from qinvert.errors import ExportError
from qinvert.export.deployment.states import StateKind, Traffic


class WindowCache:
    """Takes every state of a `Traffic`, and gives it the next one; no position in it is computed.

    Caches of attention layers move to the left: new tokens enter at the right end, and the oldest
    fall out.  Keys hold their rotation, so that their place in a cache means nothing.
    """

    is_compileable = True

    def __init__(self, traffic: Traffic, valid: torch.Tensor | None) -> None:
        self._traffic = traffic
        #: 1 for the tokens that count, ``[1, T]``; None where all do.
        self._valid = valid

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values, those of the cache first."""
        both = []
        for kind, new in ((StateKind.KEYS, keys), (StateKind.VALUES, values)):
            shape = (*new.shape[:2], self._traffic.cache, new.shape[3])
            whole = torch.cat([self._traffic.take(kind, shape, layer), new], 2)
            self._traffic.give(kind, whole[:, :, new.shape[2] :], layer)
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
        """Return the inputs of a convolution behind those of the last call that it still needs."""
        kept = (conv_kernel_size or 1) - 1
        before = self._traffic.take(StateKind.CONVOLUTION, (*inputs.shape[:2], kept), layer, state_idx)
        whole = torch.cat([before, inputs], 2)
        last = whole[:, :, inputs.shape[2] :]
        if self._valid is not None:
            last = whole @ convolution_tail(self._valid, kept)
        self._traffic.give(StateKind.CONVOLUTION, last, layer, state_idx)
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

    @property
    def layers(self) -> NoReturn:
        """What sparse attention reads, whose keys of blocks this cache does not have.

        Raises
        ------
        ExportError
            Always.
        """
        raise ExportError(
            "the model has sparse attention, which sorts blocks of tokens; deploy takes models whose "
            "attention layers see all tokens, and qinvert.export_model writes the prefill of this one"
        )

    def get_seq_length(self, *_: Any) -> int:
        """0: positions are given."""
        return 0


def convolution_tail(valid: torch.Tensor, kept: int) -> torch.Tensor:
    """Select the last ``kept`` of the inputs behind n valid tokens: ``E[t, j] = 1`` at ``t = n + j``.

    ``E = relu(1 - |t - j - n|)``, which is exact, and takes neither comparison nor selection.

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
    return torch.relu(1.0 - (places.to(torch.float32) - valid.sum(1, keepdim=True)).abs())
