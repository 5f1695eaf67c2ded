"""Packs documents into sequences of one length, and draws a sample of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter

import numpy as np

from qinvert.calibration.data.documents import Document, Labelled
from qinvert.calibration.data.tokenizers import Ids, Tokenizer, as_ids


def packed(documents: Iterable[Document], tokenizer: Callable[[], Tokenizer], seq_len: int) -> Iterator[Ids]:
    """Join all documents one after the other, and cut them into sequences of ``seq_len`` tokens.

    What is left at the end is dropped, unless it is all there is.  A sequence is ``[2, seq_len]``:
    ids, and labels, which are the ids where a document has none.

    Parameters
    ----------
    documents : iterable
        Texts, which are tokenized, or token ids, which stay as they are.
    tokenizer : callable
        Returns the tokenizer; called only where a text needs it.
    seq_len : int

    Raises
    ------
    InputError
        If a document holds neither text nor token ids.
    """
    held, empty = np.empty((2, 0), np.int64), True
    for ids in _encoded(documents, tokenizer):
        held = np.concatenate([held, ids], 1)
        whole = held.shape[1] // seq_len * seq_len
        for sequence in held[:, :whole].reshape(2, -1, seq_len).swapaxes(0, 1):
            empty = False
            yield sequence
        held = held[:, whole:]
    if empty and held.size:
        yield held


def _encoded(documents: Iterable[Document], tokenizer: Callable[[], Tokenizer]) -> Iterator[Ids]:
    for number, document in enumerate(documents):
        for index, piece in enumerate(document):
            if isinstance(piece, Labelled):
                holds = f"document {number} holds"
                yield np.stack([as_ids(piece.ids, holds), as_ids(piece.labels, f"{holds} as labels")])
                continue
            if not isinstance(piece, str):
                yield _unlabelled(as_ids(piece, f"document {number} holds"))
                continue
            found = tokenizer()
            if number and not index:
                yield _unlabelled(found.separator)
            yield _unlabelled(found.ids(piece))


def _unlabelled(ids: Ids) -> Ids:
    return np.stack([ids, ids])


def draw(sequences: Iterable[Ids], count: int, seed: int) -> list[Ids]:
    """Return ``count`` of the sequences in their order, each with the same chance; or all if there are fewer.

    This takes one pass, and holds no more sequences than it returns.

    References
    ----------
    Vitter, Random Sampling with a Reservoir, ACM TOMS 11(1), 1985: algorithm R.
    """
    rng = np.random.default_rng(seed)
    kept: list[tuple[int, Ids]] = []
    for number, sequence in enumerate(sequences):
        # A copy, because a sequence is a view of all that was read with it.
        if number < count:
            kept.append((number, sequence.copy()))
        elif (place := int(rng.integers(number + 1))) < count:
            kept[place] = (number, sequence.copy())
    return [sequence for _, sequence in sorted(kept, key=itemgetter(0))]
