"""Writes files so that a reader never sees half of one."""

from __future__ import annotations

import os
import tempfile
from os import PathLike
from pathlib import Path

from qinvert.errors import InputError


def write_atomically(path: str | PathLike[str], content: bytes) -> None:
    """Write ``content`` beside ``path`` and rename it into place.

    Raises
    ------
    InputError
        If the folder does not exist or cannot be written.
    """
    target = Path(path)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes files private; give this one the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}; choose another place") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def make_folder(path: str | PathLike[str]) -> Path:
    """Create the folder and its parents if need be, and return it.

    Raises
    ------
    InputError
        If it cannot be created.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create folder {folder}: {error.strerror}; choose another place") from None
    return folder


def read_bytes(path: str | PathLike[str]) -> bytes:
    """Return the content of a file.

    Raises
    ------
    InputError
        If it is missing or unreadable.
    """
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {os.fspath(path)!r}: {reason}; check the path") from None
