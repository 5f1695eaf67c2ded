"""Interrupted calibrations continue where they stopped, and end in the plan of an uninterrupted one.

A checkpoint holds the statistics of all layers after a number of batches, and
a hash of those batches.  On resuming, the same batches are read again and
compared with the hash, but they do not go through the model.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch

from qinvert.calibration.data.arrays import read_npz
from qinvert.calibration.data.processes import Shard
from qinvert.calibration.observation.statistics import LayerState
from qinvert.checks import check_integer
from qinvert.errors import InputError, QInvertError, reason
from qinvert.files import check_readable, write_atomically
from qinvert.matrices import check_beta, check_matrices

T = TypeVar("T")

#: Version of the file layout; a checkpoint is read by the version that wrote it.
SCHEMA_VERSION: Final = 3
#: Name of the array that holds everything but the samples, as JSON.
HEADER: Final = "checkpoint"
#: Largest number of matrices that a checkpoint may count; no data holds more.
MAX_MATRICES: Final = 2**62
#: Saving may take this share of the time.
SHARE: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedLayer:
    """One layer's statistics and what they belong to."""

    #: Size C of its matrices.
    chunk: int
    #: Titles of the observed programs.
    programs: Sequence[str]
    state: LayerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """The content of a checkpoint."""

    #: Batches, or items of a source of matrices, that were observed.
    items: int
    #: Hash of these batches or items.
    digest: str
    #: Options that decide what is drawn and counted.
    options: Mapping[str, Any]
    layers: Mapping[str, SavedLayer]


class Trail:
    """Counts and hashes what is read from a source; skips what a checkpoint has seen."""

    def __init__(self, saved: Saved | None = None) -> None:
        self.items = 0
        self._saved = saved
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        """Hash of all items read so far."""
        return self._hash.hexdigest()

    def follow(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items that the checkpoint has not seen.

        Raises
        ------
        InputError
            If the items that it has seen were other ones.
        """
        seen = 0 if self._saved is None else self._saved.items
        for item in items:
            self.items += 1
            _add(self._hash, item)
            if self.items > seen:
                yield item
            elif self.items == seen:
                self._recognize()
        if self.items < seen:
            self._recognize()

    def _recognize(self) -> None:
        if self._saved is not None and self.digest != self._saved.digest:
            raise InputError(
                f"the checkpoint was made from other data than these {self.items} batches; "
                "pass the same data, or another checkpoint file"
            )


def _add(digest: Any, item: Any) -> None:
    match item:
        case torch.Tensor():
            digest.update(f"tensor {item.dtype} {tuple(item.shape)}".encode())
            flat = item.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        case np.ndarray():
            digest.update(f"array {item.dtype} {item.shape}".encode())
            digest.update(np.ascontiguousarray(item).tobytes())
        case Mapping():
            digest.update(f"mapping {len(item)}".encode())
            for key, value in item.items():
                _add(digest, key)
                _add(digest, value)
        case list() | tuple():
            digest.update(f"sequence {len(item)}".encode())
            for value in item:
                _add(digest, value)
        case _:
            digest.update(f"{type(item).__name__} {item!r}".encode())


class Checkpoint:
    """A file in which a running calibration saves its statistics from time to time.

    Parameters
    ----------
    path
        Read first, if it exists.
    options : mapping
        What must be the same on resuming.
    shard : Shard
        The first process reads and writes.

    Raises
    ------
    InputError
        If the file is not a checkpoint, or one with other options.
    """

    def __init__(self, path: str | PathLike[str], options: Mapping[str, Any], shard: Shard) -> None:
        self.path = path
        self._options = options
        found = shard.gather("the checkpoint", load(path) if shard.rank == 0 else None)
        #: What the file held at the start, None if it did not exist.
        self.saved = found[0]
        self.trail = Trail(self.saved)
        self._next = 0.0
        if self.saved is not None and dict(self.saved.options) != dict(options):
            given, held = (", ".join(f"{k}={v}" for k, v in x.items()) for x in (options, self.saved.options))
            raise InputError(
                f"the checkpoint {os.fspath(path)} was made with {held}, not {given}; "
                "pass the same model and options, or another checkpoint file"
            )

    @property
    def due(self) -> bool:
        """Whether to save now: at first always, later so that saving takes at most `SHARE` of the time."""
        return time.monotonic() >= self._next

    def save(self, layers: Mapping[str, SavedLayer]) -> None:
        """Write what was seen so far."""
        start = time.monotonic()
        saved = Saved(items=self.trail.items, digest=self.trail.digest, options=self._options, layers=layers)
        save(self.path, saved)
        end = time.monotonic()
        self._next = end + (end - start) / SHARE


def save(path: str | PathLike[str], saved: Saved) -> None:
    """Write a checkpoint, atomically."""
    arrays: dict[str, Any] = {}
    for i, layer in enumerate(saved.layers.values()):
        state = layer.state
        for kind, keys, sample in (("", state.keys, state.sample), ("held_", state.held_keys, state.held)):
            names = ("keys", "lower", "beta")
            *parts, heads = sample if kind and sample else (*sample, None)
            for part, tensor in zip(names, (keys, *parts), strict=False):
                arrays[f"{i}.{kind}{part}"] = tensor.cpu().numpy()
            if heads is not None:
                arrays[f"{i}.{kind}heads"] = heads.cpu().numpy()
    header = {
        "schema_version": SCHEMA_VERSION,
        "items": saved.items,
        "digest": saved.digest,
        "options": dict(saved.options),
        "layers": [{"name": name, **_header(layer)} for name, layer in saved.layers.items()],
    }
    arrays[HEADER] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def _header(layer: SavedLayer) -> dict[str, Any]:
    return {
        "chunk": layer.chunk,
        "programs": list(layer.programs),
        "matrices": layer.state.matrices,
        "observed": layer.state.observed,
        "largest": dict(layer.state.largest),
        "halves": list(layer.state.halves),
        "ranges": [dict(ranges) for ranges in layer.state.ranges],
    }


def load(path: str | PathLike[str]) -> Saved | None:
    """Read a checkpoint; None if the file does not exist yet.

    Raises
    ------
    InputError
        If the file is not a checkpoint, or damaged.
    """
    if not os.path.exists(path):  # noqa: PTH110 - a path that no file can have is not there either
        return None
    try:
        check_readable(path, limit=None)
        return _read(read_npz(Path(path)))
    except QInvertError as error:
        raise InputError(f"{os.fspath(path)} is not a checkpoint: {error}; delete it to start anew") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise InputError(
            f"{os.fspath(path)} is not a checkpoint: {reason(error)}; delete it to start anew"
        ) from None


def _read(arrays: dict[str, Any]) -> Saved:
    if HEADER not in arrays:
        raise InputError(f"it has no array {HEADER!r}")
    header = json.loads(arrays[HEADER].tobytes())
    if header["schema_version"] != SCHEMA_VERSION:
        raise InputError(f"its schema_version is {header['schema_version']!r}, not {SCHEMA_VERSION}")
    return Saved(
        items=check_integer("items", header["items"], 1, MAX_MATRICES, InputError),
        digest=str(header["digest"]),
        options=dict(header["options"]),
        layers={str(x["name"]): _read_layer(x, arrays, i) for i, x in enumerate(header["layers"])},
    )


def _read_layer(record: dict[str, Any], arrays: dict[str, Any], index: int) -> SavedLayer:
    chunk = int(record["chunk"])
    keys, sample = _read_sample(arrays, f"{index}.", chunk, record["name"])
    held_keys, held = _read_sample(arrays, f"{index}.held_", chunk, record["name"])
    if len(held):
        heads = torch.from_numpy(np.array(arrays[f"{index}.held_heads"], dtype=np.float32))
        if heads.shape != held_keys.shape:
            raise InputError(f"its sample of layer {record['name']!r} does not fit together")
        held.append(heads)
    first, second = _numbers(dict(zip(("first", "second"), record["halves"], strict=True))).values()
    state = LayerState(
        matrices=check_integer("matrices", record["matrices"], len(keys), MAX_MATRICES, InputError),
        observed=check_integer("observed", record["observed"], 0, MAX_MATRICES, InputError),
        largest=_numbers(record["largest"]),
        ranges=[_numbers(ranges) for ranges in record["ranges"]],
        keys=keys,
        sample=sample,
        held_keys=held_keys,
        held=held,
        halves=(first, second),
    )
    return SavedLayer(chunk=chunk, programs=[str(title) for title in record["programs"]], state=state)


def _read_sample(
    arrays: dict[str, Any], prefix: str, chunk: int, layer: str
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return keys, and matrices with beta; a layer of which only padding was seen has no sample."""
    empty = f"{prefix}lower" not in arrays
    lower = (
        torch.zeros(0, chunk, chunk, dtype=torch.float32)
        if empty
        else check_matrices(arrays[f"{prefix}lower"], chunk)
    )
    sample = [] if empty else [lower]
    if f"{prefix}beta" in arrays:
        sample.append(check_beta(arrays[f"{prefix}beta"], lower))
    keys = torch.from_numpy(np.array(arrays[f"{prefix}keys"], dtype=np.float64))
    fits = keys.shape == lower.shape[:1] and lower.ndim == 3 and lower.dtype == torch.float32
    if not fits or not bool(((keys >= 0) & (keys <= 1)).all()):
        raise InputError(f"its sample of layer {layer!r} does not fit together")
    return keys, sample


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    numbers = {str(name): float(value) for name, value in record.items()}
    if not all(value >= 0 for value in numbers.values()):
        raise InputError("it holds ranges that are negative or NaN")
    return numbers
