"""Batches of token ids for a model: from text, files, datasets, arrays, iterables and readers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from qinvert.calibration.data.arrays import read_all, read_arrays
from qinvert.calibration.data.documents import (
    LABELS,
    MASK,
    Document,
    dataset_documents,
    file_documents,
    row_document,
)
from qinvert.calibration.data.packing import draw, packed
from qinvert.calibration.data.rows import (
    as_tensor,
    is_map_style,
    is_ragged,
    is_table,
    others,
    padded,
    plain,
    refuse_columns,
    table_rows,
    without_tables,
)
from qinvert.calibration.data.token_data import NUM_SAMPLES, SEQ_LEN, TokenData
from qinvert.calibration.data.tokenizers import find_tokenizer
from qinvert.errors import InputError, reason
from qinvert.progress import track

#: Sequences that go through a model at once.
BATCH_SIZE: Final = 8
#: Files of arrays; any other file is text.
ARRAY_FILES: Final = (".npz", ".safetensors")
#: Endings of names that mean files and not datasets.
FILE_SUFFIXES: Final = (*ARRAY_FILES, ".jsonl", ".txt", ".md")
#: Longest name of a file or data set; operating systems take no longer path.
MAX_PATH: Final = 1024
#: What may lie beside token ids, a number for each: which are real, and what is predicted.
BESIDE: Final = (MASK, LABELS)

Batches = Iterator[dict[str, Any]]


def token_batches(
    data: Any, model: torch.nn.Module | None = None, *, batch_size: int = BATCH_SIZE
) -> Batches:
    """Stream keyword arguments for ``model(**batch)``.

    Parameters
    ----------
    data
        Token ids ``[count, length]`` as a tensor or array; a path to .npz or
        .safetensors with an array ``input_ids`` (or a single array), and with
        ``attention_mask`` and ``labels`` of its shape where there are any; a path
        to .jsonl with one row per line, or to any other file, which is read as
        text; the name of a Hugging Face dataset; an iterable, or an object with
        ``get_next()``, of texts, of rows, or of batches; or any of these as
        `TokenData`, which says how to read it.  A batch is token ids, or a dict
        of keyword arguments with ``input_ids`` (from a DataLoader, for example), as
        tensors, arrays or lists; sequences of different lengths are padded, with a
        mask, and texts in a row are left out.

        Text and rows are joined, all documents one after the other, and cut
        into sequences of ``seq_len`` tokens.  ``num_samples`` of these are drawn,
        each with the same chance.  From an array ``num_samples`` rows are drawn,
        from batches the first rows are taken; with ``seq_len`` each row is cut
        first.
    model : torch.nn.Module, optional
        Its tokenizer is used for texts, see `qinvert.calibration.data.tokenizers.find_tokenizer`.
    batch_size : int
        Sequences per batch where ``data`` does not come in batches.

    Raises
    ------
    InputError
        If ``data`` is none of these, cannot be read, or holds no tokens.
    MissingDependencyError
        If ``data`` needs a package that is not installed.
    """
    empty = True
    given = data if isinstance(data, TokenData) else TokenData(data=data)
    for batch in _Reading(given, model, batch_size).batches(given.data):
        empty = False
        yield batch
    if empty:
        raise InputError("data holds no batches; pass at least one sequence of token ids, or some text")


class _Reading:
    """Turns data of every kind into batches."""

    def __init__(self, given: TokenData, model: torch.nn.Module | None, batch_size: int) -> None:
        self._given = given
        self._batch_size = batch_size
        self._tokenizer = cache(partial(find_tokenizer, model, given.tokenizer))

    def batches(self, data: Any) -> Batches:
        match data:
            case str() | os.PathLike():
                return self._named(data)
            case np.ndarray() if data.dtype == object:
                return self._items(iter(data))
            case torch.Tensor() | np.ndarray():
                return self._rows({"input_ids": _token_ids(data)})
            case _ if is_table(data):
                return self._items(iter(table_rows(data)))
            case Mapping():
                return self._items(iter([data]))
            case _ if hasattr(data, "get_next"):
                return self._items(read_all(data))
            case list() | tuple():
                # A limit may leave some of them out.
                total = len(data) if self._given.num_samples is None else None
                return self._items(without_tables(data), total)
            case Iterable():
                return self._items(without_tables(data))
            case _ if is_map_style(data):
                return self._items(without_tables(data[i] for i in range(len(data))))
        raise InputError(
            f"cannot read tokens from {type(data).__name__}; pass text or token ids: a path, an array "
            "[count, length], an iterable of texts or batches, or a get_next() reader"
        )

    def _named(self, name: str | os.PathLike[str]) -> Batches:
        path, given = Path(name), self._given
        if len(os.fspath(name)) > MAX_PATH or "\n" in os.fspath(name):
            raise InputError(
                f"data is a text of {len(os.fspath(name))} characters where a path is expected; pass [text]"
            )
        if path.suffix in ARRAY_FILES:
            arrays = read_arrays(path)
            tokens = _token_ids(_only_tokens(arrays, path))
            return self._rows({"input_ids": tokens, **_beside(arrays, tokens, f"{path} holds")})
        if path.is_file():
            return self._texts(file_documents(path, given.column))
        if path.suffix in FILE_SUFFIXES:
            raise InputError(f"cannot read {path}: no such file; pass text, .jsonl, .npz or .safetensors")
        return self._texts(dataset_documents(os.fspath(name), given.split, given.column))

    def _texts(self, documents: Iterable[Document]) -> Batches:
        given = self._given
        length, count = given.seq_len or SEQ_LEN, given.num_samples or NUM_SAMPLES
        sequences = draw(packed(documents, self._tokenizer, length), count, given.seed)
        if not sequences:
            return iter(())
        ids, labels = np.stack(sequences, 1)
        rows = {"input_ids": _token_ids(ids)}
        # Labels that are the ids say nothing.
        return self._batched(rows if np.array_equal(ids, labels) else rows | {LABELS: _token_ids(labels)})

    def _rows(self, fields: Mapping[str, torch.Tensor]) -> Batches:
        rows, count = {name: self._cut(field) for name, field in fields.items()}, self._given.num_samples
        held = len(rows["input_ids"])
        if count is not None and count < held:
            chosen = np.random.default_rng(self._given.seed).choice(held, count, replace=False)
            rows = {name: field[torch.from_numpy(np.sort(chosen))] for name, field in rows.items()}
        return self._batched(rows)

    def _batched(self, rows: Mapping[str, torch.Tensor]) -> Batches:
        starts = range(0, len(rows["input_ids"]), self._batch_size)
        return (
            {name: field[start : start + self._batch_size] for name, field in rows.items()}
            for start in track(starts, "batches", len(starts))
        )

    def _items(self, items: Iterator[Any], total: int | None = None) -> Batches:
        first = next(items, None)
        if first is None:
            return iter(())
        items = chain([first], items)
        if isinstance(first, str) or (isinstance(first, Mapping) and self._is_row(first)):
            return self._texts(row_document(row, self._given.column, "data") for row in items)
        known = items if total is None else track(items, "batches", total)
        return self._limited(map(self._batch, known))

    def _is_row(self, item: Mapping[str, Any]) -> bool:
        if self._given.column is not None:
            return self._given.column in item
        return "input_ids" not in item and isinstance(item.get("text"), str)

    def _batch(self, item: Any) -> dict[str, Any]:
        if not isinstance(item, Mapping):
            item = {"input_ids": item}
        if "input_ids" not in item:
            raise InputError(
                f"a batch has {', '.join(map(str, item)) or 'nothing'}; it needs input_ids, or text; "
                "of the splits of a data set pass one"
            )
        item = {**item, "input_ids": plain(item["input_ids"])}
        if is_ragged(item["input_ids"]):
            item = padded(item)
        tokens = _token_ids(item["input_ids"])
        item = others(item, tokens)
        if self._given.seq_len is not None and len(item) > 1:
            raise InputError(
                f"seq_len cannot cut batches of {', '.join(map(str, item))}; "
                "leave it out, or pass input_ids alone"
            )
        beside = _beside(item, tokens, "a batch has")
        return {**item, **beside, "input_ids": self._cut(tokens)}

    def _limited(self, batches: Batches) -> Batches:
        left = self._given.num_samples
        for batch in batches:
            count = len(batch["input_ids"])
            if left is None or count < left:
                yield batch
                left = None if left is None else left - count
                continue
            # No further batch is asked for, because the stream may be endless.
            yield of_sequences(batch, range(left))
            return

    def _cut(self, tokens: torch.Tensor) -> torch.Tensor:
        length = self._given.seq_len
        if length is None:
            return tokens
        whole = tokens.shape[1] // length
        if not whole:
            raise InputError(
                f"sequences of {tokens.shape[1]} tokens are shorter than seq_len {length}; "
                f"pass {tokens.shape[1]} or less"
            )
        return tokens[:, : whole * length].reshape(-1, length)


def of_sequences(batch: Mapping[str, Any], chosen: Iterable[int]) -> dict[str, Any]:
    """Return the batch of some sequences: of every value with one entry per sequence, theirs."""
    count, rows = len(batch["input_ids"]), list(chosen)

    def taken(value: Any) -> Any:
        per_sequence = isinstance(value, torch.Tensor | np.ndarray) and value.ndim and len(value) == count
        return value[rows] if per_sequence else value

    return {name: taken(value) for name, value in batch.items()}


def holds_tokens(data: str) -> bool:
    """Whether a path or name on the command line stands for text or token ids rather than matrices."""
    if Path(data).suffix not in ARRAY_FILES:
        return True
    arrays = read_arrays(data)
    return "input_ids" in arrays or all(is_integer(array) for array in arrays.values())


def _only_tokens(arrays: Mapping[str, Any], path: Any) -> Any:
    if "input_ids" in arrays:
        return arrays["input_ids"]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    raise InputError(f"{path} holds {', '.join(arrays)}; name the array of token ids input_ids")


def is_integer(array: Any) -> bool:
    """Whether a tensor or array holds integers; booleans do not count as integers."""
    if isinstance(array, torch.Tensor):
        return not (array.is_floating_point() or array.is_complex() or array.dtype == torch.bool)
    return np.asarray(array).dtype.kind in "iu"


def _beside(fields: Mapping[str, Any], tokens: torch.Tensor, has: str) -> dict[str, torch.Tensor]:
    """Return the fields `BESIDE` token ids, in their shape; other shapes are the model's own business."""
    found: dict[str, torch.Tensor] = {}
    for name in BESIDE:
        field = fields.get(name)
        if field is None or getattr(field, "ndim", 2) > tokens.ndim:
            continue
        tensor = field if isinstance(field, torch.Tensor) else _numbers(name, field)
        # One row of a data set has no axis of sequences; any other shape means another order.
        if tensor.shape not in (tokens.shape, tokens.shape[1:] if len(tokens) == 1 else tokens.shape):
            raise InputError(
                f"{has} {name} that does not fit input_ids of shape {list(tokens.shape)}: its shape is "
                f"{list(tensor.shape)}; pass one number for each token"
            )
        found[name] = tensor.reshape(tokens.shape)
    return found


def attended(batch: Mapping[str, Any]) -> torch.Tensor:
    """Where a batch of `token_batches` has real tokens, not padding; everywhere without a mask for each."""
    tokens, mask = batch["input_ids"], batch.get(MASK)
    if isinstance(mask, torch.Tensor) and mask.shape == tokens.shape:
        return mask != 0
    return torch.ones_like(tokens, dtype=torch.bool)


def _numbers(name: str, item: Any) -> torch.Tensor:
    try:
        return as_tensor(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: no array of numbers ({reason(error)}); pass [count, length]") from None


def _token_ids(item: Any) -> torch.Tensor:
    refuse_columns("token ids are", item)
    tokens = item if isinstance(item, torch.Tensor) else _numbers("token ids", item)
    tokens = tokens.unsqueeze(0) if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or not is_integer(tokens) or tokens.numel() == 0:
        raise InputError(
            f"token ids have shape {list(tokens.shape)} and dtype {tokens.dtype}; "
            "pass integers [count, length]"
        )
    return tokens.to(torch.int64)
