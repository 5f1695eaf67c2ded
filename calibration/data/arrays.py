"""Reads arrays from files and readers; pickles are never loaded."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from qinvert.calibration.heads import natural_key
from qinvert.errors import InputError, reason

#: Bytes that any .npz file may unpack to, and beyond them how many times its own size: arrays of
#: matrices that hold something compress to a tenth, and a megabyte of zeros to a thousandth.
FREE_BYTES: Final = 2**26
MAX_EXPANSION: Final = 50


def read_all(reader: Any) -> Iterator[Any]:
    """Stream what ``reader.get_next()`` returns until it returns None."""
    # Not iter(reader.get_next, None): that compares arrays with None, elementwise.
    while (item := reader.get_next()) is not None:
        yield item


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the arrays of a .npz or .safetensors file; pickles are never loaded.

    Those of a .npz file come in its order, others by name, with numbers as numbers.

    Raises
    ------
    InputError
        If the file is missing, damaged, of another kind, or holds objects.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"cannot read {file}: no such file; pass a .npz or .safetensors file")
    if file.suffix == ".npz":
        return read_npz(file)
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    raise InputError(f"cannot read {file}: unknown kind {file.suffix!r}; use .npz or .safetensors")


def read_npz(file: Path) -> dict[str, Any]:
    """Return the arrays of a file that `numpy.savez` wrote, whatever its name is.

    Raises
    ------
    InputError
        If it is damaged, of another kind, or holds objects.
    """
    try:
        with file.open("rb") as handle, zipfile.ZipFile(handle) as members:
            _check_sizes(members, file)
            handle.seek(0)
            return _members(handle)
    except InputError:
        raise
    except Exception as error:  # damaged archives raise anything from LZMAError to TokenError
        raise InputError(f"cannot read {file}: {reason(error)}; write it with numpy.savez") from None


def _members(handle: BinaryIO) -> dict[str, Any]:
    archive = np.load(handle, allow_pickle=False)
    with warnings.catch_warnings():
        # Headers as Python 2 wrote them are read right, only slowly.
        warnings.filterwarnings(
            "ignore", "Reading `.npy` or `.npz` file required additional header", UserWarning
        )
        return {name: archive[name] for name in archive.files}


def _check_sizes(members: zipfile.ZipFile, file: Path) -> None:
    """Refuse an archive that unpacks to far more than its size, before anything is unpacked."""
    size, unpacked = file.stat().st_size, sum(member.file_size for member in members.infolist())
    if unpacked > max(FREE_BYTES, MAX_EXPANSION * size):
        raise InputError(
            f"cannot read {file}: its {size:,} bytes unpack to {unpacked:,}; beyond {FREE_BYTES:,} at most "
            f"{MAX_EXPANSION} times the size of the file is read; write it with numpy.savez"
        )


def _read_safetensors(file: Path) -> dict[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"cannot read {file} without safetensors; run: pip install 'qinvert[hf]'") from None
    try:
        arrays = load_file(file)
        # The file orders them by type, then as text: "10" before "2".
        return {name: arrays[name] for name in sorted(arrays, key=natural_key)}
    except Exception as error:  # the reader raises its own types and those of torch
        raise InputError(f"cannot read {file}: {reason(error)}; write it with safetensors") from None
