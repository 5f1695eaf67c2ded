"""`qinvert.Deployment`: drives the two graphs of a folder on onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qinvert.checks import check_integer
from qinvert.errors import InputError, MissingDependencyError
from qinvert.export.deployment.manifest import DECODE, PREFILL, Manifest
from qinvert.export.deployment.states import SUFFIX

#: Logits, and everything else that goes through a graph.
Array = npt.NDArray[Any]
#: Most tokens that one call of `Deployment.generate` returns.
MAX_NEW_TOKENS: Final = 2**20


class Deployment:
    """A deployed model with its states: prefill in windows, then token by token.

    It shows what a host does: the outputs of a call are the inputs of the next, of either graph.

    Parameters
    ----------
    folder : path
        What `qinvert.deploy` wrote.
    optimized : bool
        Whether onnxruntime optimizes the graphs.
    threads : int
        Threads of onnxruntime; 0 leaves it to onnxruntime.

    Raises
    ------
    InputError
        If the folder is not a deployment.
    MissingDependencyError
        If onnxruntime is not installed.
    """

    def __init__(self, folder: str | PathLike[str], *, optimized: bool = True, threads: int = 0) -> None:
        self.manifest = Manifest.load(folder)
        self._prefill, self._decode = (
            _session(Path(folder) / name, optimized=optimized, threads=threads) for name in (PREFILL, DECODE)
        )
        self.states: dict[str, Array] = {}
        #: Entries of the caches that are taken, by tokens or by padding.
        self.used = 0
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.states = {state.name: state.zeros().numpy() for state in self.manifest.states}
        self.used = 0

    def prefill(self, tokens: Sequence[int] | Array) -> Array:
        """Run tokens through the prefill graph, window by window.

        Returns
        -------
        numpy.ndarray, float32 ``[n, vocabulary]``
            Logits of every token.

        Raises
        ------
        InputError
            If there is no token, one lies outside the vocabulary, or they do not fit the cache.
        """
        ids, size = self._checked(tokens), self.manifest.window
        self._check_room(-(-len(ids) // size) - 1, size)
        found = [self._run(self._prefill, feed, size)[:number] for number, feed in windows(ids, size)]
        return np.concatenate(found)

    def decode(self, token: int) -> Array:
        """Run one token through the decode graph, and return its logits ``[vocabulary]``.

        Raises
        ------
        InputError
            If it lies outside the vocabulary, or the cache is full.
        """
        ids = self._checked([token])
        self._check_room(0, 1)
        logits: Array = self._run(self._decode, {"input_ids": ids.astype(np.int32)[None]}, 1)[0]
        return logits

    def generate(self, tokens: Sequence[int] | Array, max_new_tokens: int) -> list[int]:
        """Return the most likely continuation, token by token; it ends with an end token, if there is one.

        Raises
        ------
        InputError
            See `prefill` and `decode`.
        """
        return list(self.stream(tokens, max_new_tokens))

    def stream(self, tokens: Sequence[int] | Array, max_new_tokens: int) -> Iterator[int]:
        """Yield what `generate` returns."""
        check_integer("max_new_tokens", max_new_tokens, 1, MAX_NEW_TOKENS, InputError)
        logits = self.prefill(tokens)[-1]
        for left in range(max_new_tokens, 0, -1):
            token = int(logits.argmax())
            yield token
            if token in self.manifest.ends:
                return
            if left > 1:
                logits = self.decode(token)

    def _run(self, session: Any, feed: dict[str, Array], entries: int) -> Array:
        wanted = {value.name for value in session.get_inputs()}
        given = {name: x for name, x in {**feed, **self.states}.items() if name in wanted}
        names = [value.name for value in session.get_outputs()]
        found = dict(zip(names, session.run(None, given), strict=True))
        self.states = {name: found[name + SUFFIX] for name in self.states}
        self.used += entries
        logits: Array = found["logits"][0]
        return logits

    def _check_room(self, windows: int, size: int) -> None:
        # Entries fall out of a cache on the left; a window also sees itself.
        cache, entries = self.manifest.cache, self.used + windows * size
        if cache and entries > cache:
            raise InputError(
                f"these tokens need {entries} entries of the caches, which have {cache}; deploy with a "
                "larger cache (--cache), or reset"
            )

    def _checked(self, tokens: Sequence[int] | Array) -> Array:
        ids = np.asarray(tokens)
        if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
            raise InputError(f"tokens of shape {list(ids.shape)} are no row of token ids; pass at least one")
        if ids.min() < 0 or ids.max() >= self.manifest.vocabulary:
            raise InputError(
                f"token ids go from {ids.min()} to {ids.max()}, but the vocabulary has "
                f"{self.manifest.vocabulary} tokens; tokenize for this model"
            )
        return ids


def windows(ids: Array, size: int) -> Iterator[tuple[int, dict[str, Array]]]:
    """Cut tokens into windows; yield the number of tokens of each, and inputs of a call beside the states.

    Only the last window may be one that is not full: its tokens stand first, with ``valid`` 0 behind them.
    """
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        filled = np.zeros((1, size), dtype=np.int32)
        filled[0, : len(part)] = part
        yield (
            len(part),
            {"input_ids": filled, "valid": (np.arange(size) < len(part)).astype(np.float32)[None]},
        )


def _session(path: Path, *, optimized: bool, threads: int) -> Any:
    try:
        from qinvert.export.runtimes.onnxruntime_cpu import open_session

        # By its path: weights may lie beside it.
        return open_session(os.fspath(path), optimized=optimized, threads=threads)
    except ImportError:
        raise MissingDependencyError(
            "running a deployment needs onnxruntime, which is not installed; run: pip install onnxruntime"
        ) from None
    except Exception as error:  # onnxruntime has no common base of its errors
        raise InputError(f"onnxruntime cannot open {path}: {str(error)[:300]}; deploy again") from None
