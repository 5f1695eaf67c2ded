"""Writes files so that a reader never sees half of one."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
    write_together({Path(path): content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write every file beside its path first, then rename all of them into place.

    Raises
    ------
    InputError
        If a file cannot be written.  Then none of them is renamed.
    """
    with ExitStack() as undo:
        temporaries: dict[Path, str] = {}
        for path, content in contents.items():
            # Links are followed to their targets.  Devices and pipes take the content directly.
            target = Path(os.path.realpath(path))
            if target.exists() and not target.is_file() and not target.is_dir():
                with _refusals(target):
                    target.write_bytes(content)
            else:
                temporaries[target] = _temporary(target, content, undo)
        for target, temporary in temporaries.items():
            with _refusals(target):
                os.replace(temporary, target)


def _temporary(target: Path, content: bytes, undo: ExitStack) -> str:
    with _refusals(target):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.")
        undo.callback(Path(temporary).unlink, missing_ok=True)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes files private; give this one the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
    return temporary


@contextmanager
def _refusals(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {target}: {said}; choose another place") from None


def make_folder(path: str | PathLike[str]) -> Path:
    """Create the folder and its parents if they do not exist, and return it.

    Raises
    ------
    InputError
        If it cannot be created.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise InputError(f"cannot create folder {folder}: {said}; choose another place") from None
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
