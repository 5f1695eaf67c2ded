"""What a model was calibrated on: how many tokens, which ones, and whether they can calibrate anything."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import torch

from qinvert.calibration.data.token_batches import attended, of_sequences
from qinvert.errors import InputError

#: Data of fewer different tokens repeats one key in every place.
FEWEST_TOKENS: Final = 3
#: What messages ask for.
NEEDED: Final = "pass text like that of the model's use, at least 16 sequences of 512 tokens"


class DataRecord:
    """Counts and hashes the real tokens of all batches; padding changes nothing."""

    def __init__(self, kept: int = 0) -> None:
        self.sequences = 0
        #: The first ``kept`` sequences, in batches.
        self.first: list[dict[str, Any]] = []
        self._kept = kept
        self.tokens = 0
        self._longest = 0
        self._holds_tokens = False
        self._different: set[int] = set()
        self._hash = hashlib.sha256()

    def follow(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches; items that are not batches of tokens are not counted."""
        for batch in batches:
            if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), torch.Tensor):
                self._add(batch)
            yield batch

    def before(self, passing: Callable[[Iterable[Any]], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
        """Return ``passing`` for batches that are recorded first."""
        return lambda batches: passing(self.follow(batches))

    def _add(self, batch: Mapping[str, Any]) -> None:
        self._holds_tokens, real = True, attended(batch).cpu()
        # A sequence of padding alone is none.
        rows = real.any(1).nonzero().squeeze(1).tolist()
        if rows and (wanted := self._kept - self.sequences) > 0:
            self.first.append(of_sequences(batch, rows[:wanted]))
        for row in rows:
            ids = batch["input_ids"][row].cpu()[real[row]]
            self.sequences += 1
            self.tokens += len(ids)
            self._longest = max(self._longest, len(ids))
            if len(self._different) < FEWEST_TOKENS:
                self._different |= set(ids.unique().tolist())
            self._hash.update(f"{len(ids)} ".encode() + ids.contiguous().numpy().tobytes())

    def check(self, chunk: int) -> None:
        """Refuse tokens that cannot calibrate matrices of that size.

        Raises
        ------
        InputError
            If no sequence fills a chunk, or nearly all tokens are the same.
        """
        if not self._holds_tokens:
            return
        if self._longest < chunk:
            raise InputError(
                f"the data cannot calibrate: its longest sequence has {self._longest} tokens, and a chunk "
                f"{chunk}; {NEEDED}"
            )
        if len(self._different) < FEWEST_TOKENS:
            raise InputError(
                f"the data cannot calibrate: its {self.tokens} tokens are {len(self._different)} different "
                f"ones; {NEEDED}"
            )

    @property
    def provenance(self) -> dict[str, Any]:
        """What a plan says of its data; empty where matrices were passed."""
        if not self.sequences:
            return {}
        return {
            "data": {"sequences": self.sequences, "tokens": self.tokens, "sha256": self._hash.hexdigest()}
        }
