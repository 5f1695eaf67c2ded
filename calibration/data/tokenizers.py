"""Tokenizers: a model's own, one that the caller passes, or bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from qinvert.calibration.patching import vocabulary_size
from qinvert.errors import InputError, reason
from qinvert.pretrained import LOCAL, require_transformers

#: Token ids of a text.
Ids = npt.NDArray[np.int64]

#: A folder with one of these has a tokenizer.
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
#: Sizes of a vocabulary that holds all bytes and at most four special tokens.
BYTE_VOCABULARY: Final = range(256, 261)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """What makes token ids of text."""

    #: Ids of a text, without special tokens.
    encode: Callable[[str], Any]
    #: What stands between two documents.
    separator: Ids
    #: Text of ids; None where a caller's function cannot be turned round.
    decode: Callable[[Sequence[int]], str] | None = None

    def ids(self, text: str) -> Ids:
        """Return the token ids of a text.

        Raises
        ------
        InputError
            If the tokenizer returns anything else.
        """
        return as_ids(self.encode(text), "the tokenizer returns")


def as_ids(row: Any, what: str) -> Ids:
    """Return a row of token ids as an array.

    Raises
    ------
    InputError
        If it is not such a row; the message begins with ``what``.
    """
    try:
        ids = np.asarray(row)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} something that is not a row of token ids ({reason(error)})") from None
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
        raise InputError(
            f"{what} {type(row).__name__} of dtype {ids.dtype} and shape {list(ids.shape)}; "
            "a text, or one row of token ids, is needed"
        )
    return ids.astype(np.int64)


def _bytes(text: str) -> Ids:
    # errors="replace": JSON may hold half of a surrogate pair.
    return np.frombuffer(text.encode(errors="replace"), dtype=np.uint8).astype(np.int64)


def _text(ids: Sequence[int]) -> str:
    # Special tokens are no bytes; a byte may be half a character.
    return bytes(i for i in ids if i < BYTE_VOCABULARY.start).decode(errors="replace")


#: Token ids are the bytes of UTF-8, with an empty line between documents.
BYTES: Final = Tokenizer(encode=_bytes, separator=_bytes("\n\n"), decode=_text)


def tokenizer_for(given: str | None, source: str, vocabulary: int) -> Tokenizer:
    """Return the tokenizer of a folder that is given, or of a model's, or bytes where the vocabulary fits.

    Raises
    ------
    InputError
        If there is no tokenizer, or it cannot be loaded.
    """
    if given is not None or (source and _has_tokenizer(Path(source))):
        return _load(source if given is None else given)
    if vocabulary in BYTE_VOCABULARY:
        return BYTES
    raise InputError(
        f"there is no tokenizer, and with {vocabulary} tokens the model does not read bytes; pass "
        "--tokenizer FOLDER, or token ids"
    )


def find_tokenizer(model: torch.nn.Module | None, given: Any = None) -> Tokenizer:
    """Return the tokenizer ``given``, or else the model's.

    A model without tokenizer files whose vocabulary has 256 to 260 tokens reads bytes.

    Parameters
    ----------
    model : torch.nn.Module, optional
        It knows the folder that it was loaded from, or its name in the cache.
    given : optional
        A tokenizer of transformers, its folder, or a callable from text to token ids.

    Raises
    ------
    InputError
        If there is no tokenizer, or it cannot be loaded.
    MissingDependencyError
        If transformers is needed, but not installed.
    """
    match given:
        case None:
            return _of_model(model)
        case str() | os.PathLike():
            return _load(given)
        case _ if hasattr(given, "eos_token_id"):
            return _of_transformers(given)
        case _ if callable(given):
            return Tokenizer(encode=given, separator=np.empty(0, np.int64))
    raise InputError(
        f"{type(given).__name__} is not a tokenizer; pass a tokenizer of transformers, its folder, "
        "or a callable from text to token ids"
    )


def _of_model(model: torch.nn.Module | None) -> Tokenizer:
    if model is None:
        raise InputError("text needs a tokenizer; pass tokenizer=... (--tokenizer), or token ids")
    name = str(getattr(model, "name_or_path", ""))
    folder, size = Path(name), vocabulary_size(model)
    # A model that was loaded by its name has its files in the cache of transformers.
    if name and (_has_tokenizer(folder) or (not folder.is_dir() and size not in BYTE_VOCABULARY)):
        return _load(name)
    if size in BYTE_VOCABULARY:
        return BYTES
    raise InputError(
        f"the model {name or 'that was passed'} has no tokenizer ({TOKENIZER_FILES[0]}), and with {size} "
        "tokens it does not read bytes; pass tokenizer=... (--tokenizer FOLDER), or token ids"
    )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _load(name: str | os.PathLike[str]) -> Tokenizer:
    transformers = require_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(os.fspath(name), **LOCAL)
    except Exception as error:  # transformers raises anything from OSError to ImportError here
        missing = "there is no such folder, and no model of this name in the cache of transformers"
        said = reason(error) if Path(name).exists() else missing
        raise InputError(
            f"cannot load a tokenizer from {os.fspath(name)}: {said}; "
            "pass a folder with tokenizer.json, or token ids"
        ) from error
    return _of_transformers(tokenizer)


def _of_transformers(tokenizer: Any) -> Tokenizer:
    end = tokenizer.eos_token_id
    return Tokenizer(
        # verbose=False: pieces may be longer than the model's context; sequences are cut from them.
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False),
        separator=np.array([] if end is None else [end], dtype=np.int64),
        decode=lambda ids: str(tokenizer.decode(ids)),
    )
