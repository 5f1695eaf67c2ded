"""Batches of token ids for a model, from arrays, files, iterables and readers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch

from qinvert.calibration.sources import read_all, read_arrays
from qinvert.errors import InputError

#: Sequences that go through a model at once.
BATCH_SIZE: Final = 8


def token_batches(data: Any, batch_size: int = BATCH_SIZE) -> Iterator[dict[str, Any]]:
    """Stream keyword arguments for ``model(**batch)``.

    Parameters
    ----------
    data
        Token ids ``[count, length]`` as a tensor or array; a path to .npz or
        .safetensors with an array ``input_ids`` (or a single array); an
        object with ``get_next()``; or an iterable of batches, each token ids
        or a dict of keyword arguments (a DataLoader, for example).
    batch_size : int
        Sequences per batch where ``data`` is one array.

    Raises
    ------
    InputError
        If ``data`` is of no such kind or holds no tokens.
    """
    empty = True
    for batch in _batches(data, batch_size):
        empty = False
        yield batch
    if empty:
        raise InputError("data holds no batches; pass at least one sequence of token ids")


def _batches(data: Any, batch_size: int) -> Iterator[dict[str, Any]]:
    match data:
        case str() | os.PathLike():
            yield from _batches(_only_tokens(read_arrays(data), data), batch_size)
        case torch.Tensor() | np.ndarray():
            tokens = _token_ids(data)
            for start in range(0, tokens.shape[0], batch_size):
                yield {"input_ids": tokens[start : start + batch_size]}
        case Mapping():
            yield _batch(data)
        case _ if hasattr(data, "get_next"):
            yield from (_batch(item) for item in read_all(data))
        case Iterable():
            yield from (_batch(item) for item in data)
        case _:
            raise InputError(
                f"cannot read tokens from {type(data).__name__}; pass token ids [count, length], "
                "an iterable of batches, a path to .npz or .safetensors, or a get_next() reader"
            )


def _batch(item: Any) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        return {"input_ids": _token_ids(item)}
    if "input_ids" not in item:
        raise InputError(f"a batch has {', '.join(map(str, item)) or 'nothing'}; it needs input_ids")
    return {**item, "input_ids": _token_ids(item["input_ids"])}


def _only_tokens(arrays: Mapping[str, Any], path: Any) -> Any:
    if "input_ids" in arrays:
        return arrays["input_ids"]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    raise InputError(f"{path} holds {', '.join(arrays)}; name the token ids input_ids")


def is_integer(array: Any) -> bool:
    """Whether a tensor or array holds integers; booleans are none."""
    if isinstance(array, torch.Tensor):
        return not (array.is_floating_point() or array.is_complex() or array.dtype == torch.bool)
    return np.asarray(array).dtype.kind in "iu"


def _token_ids(item: Any) -> torch.Tensor:
    try:
        tokens = item if isinstance(item, torch.Tensor) else torch.as_tensor(np.asarray(item))
    except (TypeError, ValueError) as error:
        raise InputError(f"token ids are no integer array ({error}); pass [count, length]") from None
    tokens = tokens.unsqueeze(0) if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or not is_integer(tokens) or tokens.numel() == 0:
        raise InputError(
            f"token ids have shape {list(tokens.shape)} and dtype {tokens.dtype}; "
            "pass integers [count, length]"
        )
    return tokens.to(torch.int64)
