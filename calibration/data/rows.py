"""Tokenized rows as libraries give them: lists of different lengths, and further fields beside the ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from qinvert.calibration.data.documents import MASK

#: Fields that are arguments of a model, whatever is in them: a text there is a fault, and no column.
ARGUMENTS: Final = (MASK, "labels", "position_ids")
#: What stands in a field where a shorter sequence has ended; 0 in all others.
FILLERS: Final = {"labels": -100}


def is_ragged(value: Any) -> bool:
    """Whether a value is a list of sequences of numbers whose lengths differ."""
    if not isinstance(value, list | tuple) or len({len(row) for row in value if _is_sequence(row)}) < 2:
        return False
    return all(_is_sequence(row) for row in value)


def _is_sequence(row: Any) -> bool:
    return isinstance(row, list | tuple | np.ndarray)


def padded(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch whose sequences end with padding, and with the mask that says where.

    Every field with one number for each token is padded alike.
    """
    lengths = [len(row) for row in item["input_ids"]]
    fields = {MASK: [np.ones(length, np.int64) for length in lengths], **item}
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


def others(item: Mapping[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
    """Return the fields beside the ids as a model takes them.

    Texts and missing values of a data set's row are no arguments of a model.
    Numbers for each token, such as position ids, get the shape of the ids.
    """
    return {
        str(name): _shaped(value, tokens)
        for name, value in item.items()
        if value is not None and (name in ARGUMENTS or not isinstance(value, str))
    }


def _shaped(value: Any, tokens: torch.Tensor) -> Any:
    if isinstance(value, list | np.ndarray):
        try:
            value = torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError):
            return value
    flat = isinstance(value, torch.Tensor) and value.ndim == 1 and value.numel() == tokens.numel()
    return value.reshape(tokens.shape) if flat and len(tokens) == 1 else value
