"""The embedded example: a task that depends on T, and a small model trained on it.

A sequence is 256 pairs of tokens.  A *write* is (key, value); a *read* is
(key + 64, the latest value of that key).  The model must remember 32 keys
that are overwritten again and again inside one chunk, so its answers are
wrong as soon as the triangular inverse is wrong.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from qinvert.checks import check_integer, check_seed
from qinvert.errors import InputError
from qinvert.pretrained import PLAIN, Loading, load_pretrained

if TYPE_CHECKING:
    import numpy.typing as npt

#: Name under which the command line offers this model.
NAME: Final = "recall"
#: Pairs of tokens in a sequence.
PAIRS: Final = 256
#: Key tokens are 0 to 31; a read shows the key plus `READ_OFFSET`.
KEYS: Final = 32
#: Distance from a key token to its read token.
READ_OFFSET: Final = 64
#: Value tokens are 128 to 159.
FIRST_VALUE: Final = 128
#: Number of values.
VALUES: Final = 32
#: Chance that a pair is a read, if its key was written before.
READ_CHANCE: Final = 0.4
#: Exponent that makes low keys frequent: key = floor(32 u^1.5).
KEY_SKEW: Final = 1.5


def sequences(count: int, seed: int = 0) -> torch.Tensor:
    """Return ``count`` random sequences, int64 ``[count, 2 * PAIRS]``.

    Raises
    ------
    InputError
        If ``count`` or ``seed`` is not legal.
    """
    check_integer("count", count, 1, 2**24, InputError)
    rng = np.random.default_rng(check_seed(seed, InputError))
    return torch.from_numpy(np.stack([_sequence(rng) for _ in range(count)]))


def _sequence(rng: np.random.Generator) -> npt.NDArray[np.int64]:
    latest: dict[int, int] = {}
    tokens: list[int] = []
    for u, w in rng.random((PAIRS, 2)):
        key = int(KEYS * u**KEY_SKEW)
        if w < READ_CHANCE and key in latest:
            tokens += [key + READ_OFFSET, latest[key]]
        else:
            latest[key] = FIRST_VALUE + int(rng.integers(VALUES))
            tokens += [key, latest[key]]
    return np.array(tokens, dtype=np.int64)


def read_positions(tokens: torch.Tensor) -> torch.Tensor:
    """Return where the read keys are; the token after each of them must be recalled."""
    return (tokens >= READ_OFFSET) & (tokens < READ_OFFSET + KEYS)


def accuracy(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Share of reads whose value is predicted; NaN if there are no reads.

    Parameters
    ----------
    logits : torch.Tensor, shape ``[B, T, vocabulary]``
    tokens : torch.Tensor, shape ``[B, T]``
    """
    reads = read_positions(tokens[:, :-1])
    right = logits[:, :-1].argmax(-1) == tokens[:, 1:]
    return float(right[reads].to(torch.float32).mean())


def load_model(loading: Loading = PLAIN) -> Any:
    """Load the trained model (0.39 M parameters, two gated-delta layers) in float32 and eval mode.

    Raises
    ------
    MissingDependencyError
        If transformers is not installed.
    """
    return load_pretrained(str(files("qinvert") / "assets" / "recall"), loading)
