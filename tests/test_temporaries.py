"""Writes that are killed, that race, and that cannot succeed."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

import qinvert
from qinvert.cli.app import cli
from qinvert.cli.graph_folder import check_same_plan, export_all, export_together
from qinvert.errors import InputError
from qinvert.files import (
    check_folder,
    check_readable,
    check_replaceable,
    check_writable,
    new_folder,
    write_atomically,
    write_together,
)
from qinvert.stress import stress_matrices
from qinvert.temporaries import GRACE, SCRATCH, SUFFIX, scratch_folder, temporary_file, temporary_folder

#: Writes large files until it is killed.
WRITER = """
import sys
from pathlib import Path
from qinvert.files import write_atomically
from qinvert.temporaries import temporary_folder
path, content = Path(sys.argv[1]), bytes(2**22)
with temporary_folder(path) as folder:
    (folder / "part").write_bytes(content)
    print("started", flush=True)
    while True:
        write_atomically(path, content)
"""


def age(path, seconds=2 * GRACE):
    then = time.time() - seconds
    os.utime(path, (then, then))


def temporaries(folder):
    return [path for path in folder.iterdir() if path.name.endswith(SUFFIX)]


def test_what_killed_writers_leave_is_deleted_by_the_next_one(tmp_path):
    target = tmp_path / "plan.json"
    for i in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, env=environment()
        )
        assert writer.stdout.readline() == b"started\n"
        time.sleep(0.01 * i)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    left = temporaries(tmp_path)
    assert left
    assert target.stat().st_size in (0, 2**22)
    for path in left:
        age(path)
    other = tmp_path / f".other.json.0123{SUFFIX}"
    other.write_bytes(b"of another file")
    age(other)
    write_atomically(target, b"new")
    assert temporaries(tmp_path) == [other]
    assert target.read_bytes() == b"new"


def test_what_killed_processes_leave_among_the_system_s_temporary_files_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    other = tmp_path / "of somebody else"
    other.mkdir()
    killed = temporary_folder(tmp_path / SCRATCH)
    left = killed.__enter__()
    (left / "part").write_bytes(b"x")
    age(left)
    with scratch_folder() as running:
        # Its process runs, for all that is known: the lock is held.
        assert sorted(tmp_path.iterdir()) == sorted([left, other, running.parent])
        assert running.parent.stat().st_mode & 0o77 == 0
        assert not list(running.iterdir())
    shutil.copytree(left, ended := left.with_name(left.name.replace("scratch.", "scratch.0")))
    age(ended)
    with scratch_folder():
        assert not ended.exists()
    killed.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == [other]


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_temporaries_of_running_writers_stay(tmp_path):
    target = tmp_path / "plan.json"
    with temporary_file(target) as (_, path), temporary_folder(target) as folder:
        for own in (path, folder):
            age(own)
        write_atomically(target, b"new")
        assert {*temporaries(tmp_path)} == {path, folder}
    assert temporaries(tmp_path) == []


def test_permissions_follow_the_umask_which_no_thread_sees_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", None)
    write_atomically(tmp_path / "file", b"")
    monkeypatch.undo()
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "other", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~before
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o640


def test_two_writers_leave_one_whole_file(tmp_path):
    contents = [bytes([i]) * 2**20 for i in range(4)]

    def write(content):
        for _ in range(20):
            write_atomically(tmp_path / "file", content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() in contents
    assert temporaries(tmp_path) == []


@contextmanager
def small_disk(size):
    """No file may have more than ``size`` bytes: a write fails in the middle, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_in_the_middle_leaves_old_files(tmp_path):
    old = {tmp_path / name: b"old" for name in ("a", "b")}
    write_together(old)
    with small_disk(2**16), pytest.raises(InputError, match=r"cannot write .*b: .*; choose another place"):
        write_together({tmp_path / "a": b"new", tmp_path / "b": bytes(2**17)})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == old


#: Libraries and verbs that write, and what they write over.
FULL = {
    "plan": lambda plan, folder: plan.save(folder / "plan.json"),
    "checkpoint": lambda _, folder: qinvert.calibrate(
        [stress_matrices("half_random", 4, 16)], checkpoint=folder / "checkpoint"
    ),
    "export": lambda plan, folder: qinvert.export(plan, folder / "a.onnx", layer="a"),
    "export of all layers": lambda plan, folder: export_all(plan, str(folder)),
    "export in one file": lambda plan, folder: export_together(plan, str(folder)),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk_is_said_in_one_line_and_leaves_everything_as_it_was(kind, tmp_path):
    plan = plan_of(1)
    for name in ("plan.json", "a.onnx", "b.onnx", "c.onnx", "all_layers.onnx"):
        (tmp_path / name).write_bytes(b"old")
    with small_disk(2**10), pytest.raises(InputError, match=r"cannot write .*; choose another") as refused:
        FULL[kind](plan, tmp_path)
    assert str(refused.value).isprintable()
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"old"}
    assert len(list(tmp_path.iterdir())) == 5


@pytest.fixture
def read_only(monkeypatch):
    """Nothing new can be created; whoever may write everywhere is not held by permissions of a folder."""
    refusal, opened = OSError(errno.EROFS, os.strerror(errno.EROFS)), os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_CREAT:
            raise refusal
        return opened(path, flags, *rest, **more)

    def refuse_folder(*_, **__):
        raise refusal

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "mkdir", refuse_folder)


def test_a_read_only_folder_is_found_before_the_work(tmp_path, read_only, monkeypatch):
    plan = plan_of(1)
    monkeypatch.setattr("qinvert.calibration.calibrate.calibrate", None)
    monkeypatch.setattr("qinvert.cli.sources.load_model", None)
    writes = {
        **FULL,
        "new folder": lambda _, folder: new_folder(folder / "new", "manifest").__enter__(),
        "folder of another": lambda _, folder: new_folder(folder, "manifest").__enter__(),
    }
    for write in writes.values():
        with pytest.raises(InputError, match=r"^cannot write .*: Read-only file system; choose another"):
            write(plan, tmp_path)
    for verb in (
        ("calibrate", "recall", "-o", tmp_path / "plan.json"),
        ("export", "plan.json", "-o", tmp_path / "graphs"),
        ("export-model", "plan.json", "-o", tmp_path / "m.onnx"),
        ("graft", "host.onnx", "plan.json", "-o", tmp_path / "m.onnx"),
        ("deploy", "recall", "-o", tmp_path / "out"),
        ("demo", "-o", tmp_path / "demo"),
    ):
        result = CliRunner().invoke(cli, list(map(str, verb)))
        assert result.exit_code == 2
        assert "Read-only file system; choose another place" in result.output
    assert not list(tmp_path.iterdir())


def test_two_exports_into_one_folder_are_one_after_the_other(tmp_path, monkeypatch):
    plans, replace, barrier = [plan_of(seed) for seed in (0, 1)], os.replace, threading.Barrier(2)

    def together(contents):
        barrier.wait()
        write_together(contents)

    monkeypatch.setattr("qinvert.cli.graph_folder.write_together", together)

    def slow(source, target):
        # Every rename gives the other writer the chance to come between.
        time.sleep(0.005)
        replace(source, target)

    monkeypatch.setattr("qinvert.files.os.replace", slow)
    for _ in range(3):
        writers = [threading.Thread(target=export_all, args=(plan, str(tmp_path))) for plan in plans]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        check_same_plan(qinvert.Plan.load(tmp_path / "plan.json"), tmp_path)
    assert temporaries(tmp_path) == []


def test_two_calibrations_with_one_checkpoint_end_in_the_plan_of_one(tmp_path):
    batches = [stress_matrices("half_random", 4, 16, seed) for seed in range(6)]
    expected, found = qinvert.calibrate(batches).to_bytes(), []

    def calibrate():
        found.append(qinvert.calibrate(batches, checkpoint=tmp_path / "checkpoint").to_bytes())

    writers = [threading.Thread(target=calibrate) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    calibrate()
    assert found == [expected] * 3
    assert temporaries(tmp_path) == []


@pytest.mark.parametrize("path", ["a\0b", "a\ud800", "x" * 5000])
def test_paths_that_no_file_can_have_are_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = plan_of(0)
    plan.save("plan.json")
    for write in (
        check_writable,
        check_folder,
        plan.save,
        lambda path: check_replaceable(path, "manifest"),
        lambda path: qinvert.export(plan, path, layer="a"),
        lambda path: export_all(plan, path),
        lambda path: qinvert.calibrate([stress_matrices("half_random", 4, 16)], checkpoint=path),
        lambda path: qinvert.graft("plan.json", plan, path),
    ):
        with pytest.raises(InputError, match=r"^cannot (write|create|read) .*; choose another place"):
            write(path)
    for read in (lambda path: qinvert.graft(path, plan, "out.onnx"), qinvert.Plan.load, check_readable):
        with pytest.raises(qinvert.QInvertError, match=r"cannot read .*; check the path"):
            read(path)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qinvert.files.os.dup", full)
    with pytest.raises(InputError, match="No space left on device; choose another place"):
        write_together({tmp_path / "other": b"new", tmp_path / "file": b"new"})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_places_that_cannot_be_written_are_found_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "new")
    check_writable("/dev/null")
    check_folder(tmp_path / "new" / "folder")
    check_folder(tmp_path)
    for path in (tmp_path, tmp_path / "no" / "file", tmp_path / "file" / "file", "/proc/nothing"):
        with pytest.raises(InputError, match=r"cannot write .*; choose another place"):
            check_writable(path)
    for path in (tmp_path / "file", tmp_path / "file" / "folder", "/proc/nothing"):
        with pytest.raises(InputError, match=r"cannot write .*; choose another place"):
            check_folder(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrate", "recall", "-o", "no/plan.json"],
        ["calibrate", "recall", "-o", "plan.json", "--checkpoint", "no/checkpoint"],
        ["export", "plan.json", "-o", "file/graphs"],
        ["export-model", "plan.json", "-o", "no/model.onnx"],
        ["graft", "model.onnx", "plan.json", "-o", "no/model.onnx"],
        ["demo", "-o", "file/demo"],
        ["deploy", "recall", "-o", "file/out"],
        ["report", "plan.json", "-o", "no/page.html"],
    ],
)
def test_verbs_find_them_before_the_work(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    plan_of(0).save("plan.json")
    # The work would not get far: nothing that is named exists, or nothing is loaded.
    monkeypatch.setattr("qinvert.cli.sources.load_model", None)
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "cannot write" in result.output


def plan_of(seed):
    lower = {name: stress_matrices("half_random", 4, 16, seed) for name in ("a", "b", "c")}
    return qinvert.calibrate(lower, method="block_merge", target="npu-qdq-int8", min_sqnr_db=0)


def test_an_export_that_is_killed_between_two_files_is_found(tmp_path, monkeypatch):
    old, new = plan_of(0), plan_of(1)
    export_all(old, str(tmp_path))
    check_same_plan(old, tmp_path)
    replace, count = os.replace, 0

    def killed(source, target):
        nonlocal count
        count += 1
        if count > 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("qinvert.files.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export_all(new, str(tmp_path))
    monkeypatch.undo()
    # The plan comes last, so the folder says that it is of the old one.
    assert qinvert.Plan.load(tmp_path / "plan.json") == old
    with pytest.raises(InputError, match=r"a\.onnx, b\.onnx were exported from another plan"):
        check_same_plan(old, tmp_path)
    result = CliRunner().invoke(cli, ["verify", str(tmp_path)])
    assert result.exit_code == 2
    assert "exported from another plan" in result.output
    export_all(new, str(tmp_path))
    check_same_plan(new, tmp_path)


def test_graphs_of_layers_that_a_new_plan_has_not_are_found(tmp_path):
    export_all(plan_of(0), str(tmp_path))
    fewer = plan_of(1)
    fewer = qinvert.Plan(layers={"a": fewer.layers["a"]}, target=fewer.target)
    export_all(fewer, str(tmp_path))
    result = CliRunner().invoke(cli, ["verify", "--json", str(tmp_path)])
    assert result.exit_code == 2
    assert "b.onnx, c.onnx were exported from another plan" in result.output
    assert json.loads((tmp_path / "plan.json").read_text())["layers"].keys() == {"a"}
