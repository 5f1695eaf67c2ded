"""Writes files so that a reader never sees half of one."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import BinaryIO, Final

from qinvert.errors import InputError
from qinvert.temporaries import alone, exchange, temporary_file, temporary_folder

#: Largest file that is read at once: that of an ONNX model, whose format ends there.
MAX_BYTES: Final = 2**31
#: Bytes that are read at a time.
PIECE: Final = 2**20


def write_atomically(path: str | PathLike[str], content: bytes) -> None:
    """Write ``content`` beside ``path`` and rename it into place.

    Raises
    ------
    InputError
        If the folder does not exist or cannot be written.
    """
    write_together({Path(path): content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write every file beside its path first, then rename all of them into place, in their order.

    A process that is killed between two renames leaves the first files new and
    the last ones old: pass the file by which a reader tells whether the others
    are complete as the last one.  Two writers do so one after the other.

    Raises
    ------
    InputError
        If a file cannot be written.  Then none of them is renamed.
    """
    with ExitStack() as undo:
        temporaries: dict[Path, Path] = {}
        for path, content in contents.items():
            # Devices and pipes take the content directly.
            target = _target(path)
            with refusals(target):
                if _is_stream(target):
                    target.write_bytes(content)
                else:
                    temporaries[target] = _temporary(target, content, undo)
        for folder in {target.parent for target in temporaries}:
            undo.enter_context(alone(folder))
        for target, temporary in temporaries.items():
            with refusals(target):
                os.replace(temporary, target)


def check_writable(path: str | PathLike[str]) -> None:
    """Refuse a path that `write_atomically` could not write, before the work starts; nothing is left there.

    Raises
    ------
    InputError
        If the path is a folder, or its folder does not exist or cannot be written.
    """
    target = _target(path)
    with refusals(target), ExitStack() as undo:
        if not _is_stream(target):
            _temporary(target, b"", undo)


def check_target(path: str | PathLike[str]) -> None:
    """Refuse a path that a model cannot be written to, before the work starts.

    A model names the file of its weights, so that its own name must be text.

    Raises
    ------
    InputError
        If the path cannot be written, or its name is not UTF-8.
    """
    check_writable(path)
    name = os.fsencode(Path(path).name)
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"the file name {name!r} is not UTF-8 text; choose another name") from None


def check_folder(path: str | PathLike[str]) -> None:
    """Refuse a folder that cannot be created or written, before the work starts; nothing is left there.

    Raises
    ------
    InputError
        If it is a file, or cannot be written.
    """
    folder = _target(path)
    with refusals(folder), ExitStack() as undo:
        parent = next(place for place in (folder, *folder.parents) if place.exists())
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        _temporary(parent / "graph", b"", undo)


def _target(path: str | PathLike[str]) -> Path:
    """Return the place to which links lead; a path that no file can have is refused."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {os.fspath(path)!r}: {error}; choose another place") from None


def _is_stream(target: Path) -> bool:
    return target.exists() and not target.is_file() and not target.is_dir()


def _temporary(target: Path, content: bytes, undo: ExitStack) -> Path:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    handle, temporary = undo.enter_context(temporary_file(target))
    with os.fdopen(os.dup(handle), "wb") as file:
        file.write(content)
    return temporary


@contextmanager
def refusals(target: Path) -> Iterator[None]:
    """Say of what the system refuses inside the ``with`` block that ``target`` cannot be written.

    Raises
    ------
    InputError
        In the place of every OSError.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}; choose another place") from None


def _pieces(file: BinaryIO, limit: int) -> Iterator[bytes]:
    """Yield the content up to one piece beyond ``limit``; one large read would allocate all of ``limit``."""
    left = limit
    while left >= 0 and (piece := file.read(PIECE)):
        left -= len(piece)
        yield piece


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


@contextmanager
def new_folder(path: str | PathLike[str], marker: str) -> Iterator[Path]:
    """Yield an empty folder, which takes the place of ``path`` when the ``with`` block has ended.

    After an exception, or where the process is killed at any moment, ``path`` is what it was, or
    the new folder: on Linux the two names are exchanged by one call of the kernel.

    Parameters
    ----------
    path : path
        Nothing, an empty folder, or one that was written this way before, which is replaced.
    marker : str
        File by which such a folder is known.

    Raises
    ------
    InputError
        If there is something else, or the folder cannot be written.
    """
    target = _target(path)
    check_replaceable(target, marker)
    make_folder(target.parent)
    with refusals(target), temporary_folder(target) as scratch:
        work = scratch / "new"
        work.mkdir()
        yield work
        with alone(target.parent):
            _take_place(work, target, scratch / "old")


def _take_place(work: Path, target: Path, old: Path) -> None:
    """Rename ``work`` to ``target``; what is there goes to ``old``, or takes the place of ``work``.

    Where the system can exchange two names, no moment is without a folder.  Elsewhere a process
    that is killed between two renames leaves the old one among its temporaries.
    """
    if not target.exists():
        work.rename(target)
        return
    if exchange(work, target):
        return
    target.rename(old)
    try:
        work.rename(target)
    except OSError:
        old.rename(target)
        raise


def check_replaceable(path: str | PathLike[str], marker: str) -> None:
    """Refuse a folder that `new_folder` could not write, before the work starts.

    Raises
    ------
    InputError
        If it is a file, cannot be written, or holds something that was not written this way.
    """
    target = _target(path)
    check_folder(target)
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise InputError(f"{target} holds other files and no {marker}; pass a new or an empty folder")


def check_readable(path: str | PathLike[str], limit: int | None = MAX_BYTES) -> None:
    """Refuse what a reader that takes a file as a whole must not be given.

    Raises
    ------
    InputError
        If it is missing, no file, such as a device, which may never end, or has more than ``limit`` bytes.
    """
    with _unreadable(path):
        found = Path(path).stat()
        _refuse_device(found.st_mode, path)
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"cannot read {os.fspath(path)!r}: it is a folder or a pipe; pass a file")
        _refuse_larger(found.st_size, path, limit)


def read_bytes(path: str | PathLike[str], limit: int = MAX_BYTES) -> bytes:
    """Return the content of a file or pipe of at most ``limit`` bytes.

    Raises
    ------
    InputError
        If it is missing, unreadable, a device, which may never end, or larger.
    """
    with _unreadable(path), Path(path).open("rb") as file:
        _refuse_device(os.fstat(file.fileno()).st_mode, path)
        content = b"".join(_pieces(file, limit))
        _refuse_larger(len(content), path, limit)
    return content


def _refuse_device(mode: int, path: str | PathLike[str]) -> None:
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise InputError(f"cannot read {os.fspath(path)!r}: it is a device; pass a file")


def _refuse_larger(size: int, path: str | PathLike[str], limit: int | None) -> None:
    if limit is not None and size > limit:
        raise InputError(f"cannot read {os.fspath(path)!r}: it has more than {limit:,} bytes; check the path")


@contextmanager
def _unreadable(path: str | PathLike[str]) -> Iterator[None]:
    try:
        yield
    except InputError:
        # It is a ValueError, and says what is to be said.
        raise
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {os.fspath(path)!r}: {said}; check the path") from None
