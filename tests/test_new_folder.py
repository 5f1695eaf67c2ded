"""Folders that take their place as a whole: replaced at one moment, whatever happens to the writer."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from qinvert import files
from qinvert.errors import InputError
from qinvert.files import new_folder
from qinvert.temporaries import exchange

MARKER = "manifest"
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs renameat2")


def write(target, content):
    with new_folder(target, MARKER) as folder:
        for name in ("first", MARKER):
            (folder / name).write_text(content)


def contents(target):
    return {path.name: path.read_text() for path in target.iterdir()}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_and_nothing_else_is_left(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "exchange", lambda *_: False)
    target = tmp_path / "deep" / "out"
    for content in ("old", "new"):
        write(target, content)
        assert contents(target) == {"first": content, MARKER: content}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@linux
def test_a_reader_sees_a_folder_at_every_moment(tmp_path):
    target, stop, missing = tmp_path / "out", threading.Event(), []
    write(target, "0")

    def read():
        while not stop.is_set():
            if not (target / MARKER).exists():
                missing.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(50):
        write(target, str(i))
    stop.set()
    reader.join()
    assert not missing


@linux
def test_two_writers_leave_the_folder_of_one(tmp_path, monkeypatch):
    target, failed, exists_now = tmp_path / "out", [], Path.exists

    def slow(path):
        # What is there now is something else when the writer goes on.
        found = exists_now(path)
        if path == target:
            time.sleep(0.1)
        return found

    monkeypatch.setattr(Path, "exists", slow)

    def new(content):
        try:
            write(target, content)
        except InputError as error:
            failed.append(error)

    # At first nothing is there, then a folder.
    for _ in range(2):
        writers = [threading.Thread(target=new, args=(content,)) for content in ("one", "two")]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert not failed
        assert contents(target) in [{"first": c, MARKER: c} for c in ("one", "two")]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_said_in_one_line(tmp_path):
    write(tmp_path / "out", "old")

    def fill():
        with new_folder(tmp_path / "out", MARKER):
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"cannot write .*out: No space left on device; choose another"):
        fill()
    assert contents(tmp_path / "out") == {"first": "old", MARKER: "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


#: Calls at which a writer is killed, before or after: all that change what has a name.
CALLS = [(Path, "mkdir"), (Path, "write_text"), (Path, "rename"), (files, "exchange")]


@linux
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("owner", "name"), CALLS)
@pytest.mark.parametrize("exists", [False, True])
def test_a_killed_writer_leaves_the_old_folder_or_the_new_one(tmp_path, owner, name, after, exists):
    target = tmp_path / "out"
    if exists:
        write(target, "old")
    call, child = getattr(owner, name), os.fork()
    if not child:

        def killed(*arguments, **options):
            if after:
                call(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, killed)
        write(target, "new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    reached = name in ("mkdir", "write_text") or name == ("exchange" if exists else "rename")
    assert os.WIFSIGNALED(status) == reached
    whole = [{"first": content, MARKER: content} for content in ("old", "new")]
    if exists:
        assert contents(target) in whole
    else:
        assert not target.exists() or contents(target) == whole[1]
    write(target, "next")
    assert contents(target) == {"first": "next", MARKER: "next"}


def test_without_an_exchange_a_failed_rename_brings_the_old_folder_back(tmp_path, monkeypatch):
    target, rename = tmp_path / "out", Path.rename
    write(target, "old")
    monkeypatch.setattr(files, "exchange", lambda *_: False)

    def refuse(path, to):
        if path.name == "new":
            raise OSError(28, "No space left on device")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match="No space left"):
        write(target, "new")
    assert contents(target) == {"first": "old", MARKER: "old"}


@linux
def test_exchange_says_when_it_cannot(tmp_path):
    assert exchange(tmp_path / "none", tmp_path / "nothing") is False
