"""Temporary files and folders beside what they will replace, and what killed processes left of them."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

try:
    import fcntl
except ImportError:  # pragma: no cover - there are no such locks on Windows, where nothing is cleaned
    fcntl = None  # type: ignore[assignment]

#: End of every temporary name; what stands before is the name of the target and a random part.
SUFFIX: Final = ".qinvert-tmp"
#: Name of the file in a temporary folder that its process holds a lock on.
LOCK: Final = "lock"
#: What a folder among the system's temporary files stands for.
SCRATCH: Final = "scratch"
#: Seconds after which a temporary without a lock was left by a killed process: before that, its
#: process may be about to lock it.
GRACE: Final = 60.0
#: Constants of Linux, from its headers: paths are as they are, and two names are exchanged.
AT_FDCWD: Final = -100
RENAME_EXCHANGE: Final = 2


@contextmanager
def temporary_file(target: Path) -> Iterator[tuple[int, Path]]:
    """Create an empty file beside ``target``, with the usual permissions, and delete it at the end.

    Yields an open descriptor and the path, which may have been renamed by then.
    """
    clean(target)
    path = _name(target)
    # The kernel takes the umask off these permissions; asking for it would change it for all threads.
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        _lock(handle)
        yield handle, path
    finally:
        os.close(handle)
        path.unlink(missing_ok=True)


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Create an empty folder beside ``target``, and delete it with all that is in it at the end."""
    clean(target)
    path = _name(target)
    path.mkdir(mode=0o700)
    handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(handle)
        yield path
    finally:
        os.close(handle)
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Create an empty folder where the system has temporary files, and delete it at the end.

    Folders that killed processes left there are deleted first, as beside files.
    """
    with temporary_folder(Path(tempfile.gettempdir()) / SCRATCH) as folder:
        # Apart from the lock, which is no business of what works in it.
        work = folder / "work"
        work.mkdir()
        yield work


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other writer renames several files of a folder, and keep others waiting.

    Where the system has no such locks, writers do not wait for each other.
    """
    with ExitStack() as undo:
        if fcntl is not None:
            with suppress(OSError):
                handle = os.open(folder, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                undo.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders at one moment; False where the system cannot.

    This is ``renameat2`` of Linux with ``RENAME_EXCHANGE``, which Python does not offer.
    """
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    names = (os.fsencode(path) for path in (one, other))
    first, second = (ctypes.c_char_p(name) for name in names)
    return bool(call(AT_FDCWD, first, AT_FDCWD, second, ctypes.c_uint(RENAME_EXCHANGE)) == 0)


def clean(target: Path) -> None:
    """Delete temporaries of ``target`` whose processes have ended without doing so."""
    if fcntl is None:
        return
    with suppress(OSError):
        for path in target.parent.iterdir():
            if path.name.startswith(_start(target)) and path.name.endswith(SUFFIX) and _is_left(path):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _is_left(path: Path) -> bool:
    try:
        if time.time() - path.lstat().st_mtime < GRACE or path.is_symlink():
            return False
        handle = os.open(path / LOCK if path.is_dir() else path, os.O_RDWR)
    except FileNotFoundError:
        # A folder without its lock: the process was killed between the two.
        return True
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _lock(handle: int) -> None:
    if fcntl is not None:
        # Some network file systems have no locks; then nothing is cleaned there either.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _start(target: Path) -> str:
    return f".{target.name[:100]}."


def _name(target: Path) -> Path:
    return target.parent / f"{_start(target)}{secrets.token_hex(8)}{SUFFIX}"
