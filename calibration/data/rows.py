"""Tokenized rows as libraries give them: lists of different lengths, and further fields beside the ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from qinvert.calibration.data.documents import LABELS, MASK
from qinvert.errors import InputError

#: Fields that are arguments of a model, whatever is in them: a text there is a fault, and no column.
ARGUMENTS: Final = (MASK, LABELS, "position_ids")
#: What stands in a field where a shorter sequence has ended; 0 in all others.
FILLERS: Final = {LABELS: -100}


def is_table(value: Any) -> bool:
    """Whether a value is a table of pandas or Arrow; iterating over those gives columns, not rows."""
    return hasattr(value, "iterrows") or hasattr(value, "to_pylist")


def table_rows(table: Any) -> list[dict[str, Any]]:
    """Return the rows of a table of pandas or Arrow."""
    found: list[dict[str, Any]] = (
        table.to_dict("records") if hasattr(table, "iterrows") else table.to_pylist()
    )
    return found


def without_tables(items: Iterable[Any]) -> Iterator[Any]:
    """Yield items, and instead of a table its rows."""
    for item in items:
        yield from table_rows(item) if is_table(item) else [item]


def is_map_style(data: Any) -> bool:
    """Whether data have a length and items by number alone, as data sets of torch may."""
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def plain(item: Any) -> Any:
    """Return an array of rows as the list that it stands for, and the only tensor of a list as itself.

    numpy has no other array of rows whose lengths differ; a TensorDataset gives
    tuples of one tensor, and a DataLoader over it lists of one.
    """
    if isinstance(item, np.ndarray) and item.dtype == object:
        return list(item)
    single = isinstance(item, list | tuple) and len(item) == 1 and isinstance(item[0], torch.Tensor)
    # A list of one row could be the only column of rows with one token.
    return item[0] if single and (item[0].ndim == 2 or isinstance(item, tuple)) else item


def as_tensor(value: Any) -> torch.Tensor:
    """Return lists or an array as a tensor; of an array that cannot be written, as in tables, a copy."""
    array = np.asarray(value)
    return torch.as_tensor(array if array.flags.writeable else array.copy())


def is_ragged(value: Any) -> bool:
    """Whether a value is a list of sequences of numbers whose lengths differ."""
    if not isinstance(value, list | tuple) or not all(_is_sequence(row) for row in value):
        return False
    return len({len(row) for row in value}) > 1


def _is_sequence(row: Any) -> bool:
    return isinstance(row, list | tuple) or (isinstance(row, np.ndarray | torch.Tensor) and row.ndim == 1)


def padded(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch whose sequences end with padding, and with the mask that says where.

    Every field with one number for each token is padded alike.
    """
    lengths = [len(row) for row in item["input_ids"]]
    given = {name: plain(value) for name, value in item.items()}
    fields = {MASK: [np.ones(length, np.int64) for length in lengths], **given}
    return {
        name: _padded(value, lengths, FILLERS.get(name, 0)) if _fits(value, lengths) else value
        for name, value in fields.items()
    }


def _fits(value: Any, lengths: Sequence[int]) -> bool:
    rows = isinstance(value, list | tuple) and all(_is_sequence(row) for row in value)
    return rows and [len(row) for row in value] == list(lengths)


def _padded(rows: Sequence[Any], lengths: Sequence[int], filler: int) -> Any:
    parts = [np.asarray(row) for row in rows]
    wide = np.full((len(rows), max(lengths)), filler, dtype=np.result_type(*parts))
    for row, part in zip(wide, parts, strict=True):
        row[: len(part)] = part
    return wide


def refuse_columns(words: str, value: Any) -> None:
    """Refuse a list of tensors of numbers for tokens; ``words`` begin the message.

    Raises
    ------
    InputError
        If a part is a tensor of two axes or fewer; those of images and caches have more.
    """
    if not isinstance(value, list | tuple):
        return
    if any(isinstance(part, torch.Tensor) and part.ndim <= 2 for part in value):
        sizes = ", ".join(dict.fromkeys(str(list(getattr(part, "shape", ()))) for part in value))
        raise InputError(
            f"{words} a {type(value).__name__} of {len(value)} tensors {sizes}, of which nobody can tell "
            "whether they are sequences or, as the default collate_fn of a DataLoader gives them, columns; "
            "pass one tensor [count, length] (torch.stack of rows, or rows as tensors in the dataset)"
        )


def others(item: Mapping[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
    """Return the fields beside the ids as a model takes them.

    Texts and missing values of a data set's row are no arguments of a model.
    Numbers for each token, such as position ids, get the shape of the ids.
    """
    return {
        str(name): _shaped(str(name), value, tokens)
        for name, value in item.items()
        if value is not None and (name in ARGUMENTS or not _is_text(value))
    }


def _is_text(value: Any) -> bool:
    if isinstance(value, list | tuple | np.ndarray) and len(value):
        return all(isinstance(part, str) for part in value)
    return isinstance(value, str)


def _shaped(name: str, value: Any, tokens: torch.Tensor) -> Any:
    refuse_columns(f"{name} is", value)
    if isinstance(value, list | tuple | np.ndarray):
        try:
            value = as_tensor(value)
        except (TypeError, ValueError):
            return value
    if not isinstance(value, torch.Tensor) or value.ndim != 1 or len(value) != tokens.shape[1]:
        return value
    # Positions may be those of every sequence; anything else of a batch has one value for each.
    shared = len(tokens) == 1 or name == "position_ids"
    return value.expand(tokens.shape) if shared else value
