"""Models whose weights lie in a second file: what a killed, failing or second writer leaves."""

import os
import signal
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qinvert.errors import InputError
from qinvert.export.whole_models import export_model
from qinvert.export.whole_models.export_model import save
from qinvert.temporaries import GRACE, SUFFIX

ir = pytest.importorskip("onnx_ir", reason="pip install 'qinvert[model]'")


@pytest.fixture(autouse=True)
def small_limit(monkeypatch):
    """Every model has its weights in a second file."""
    monkeypatch.setattr(export_model, "MAX_BYTES", 0)


def model(factor):
    """Of two weights: a graph of one model with a weight of another would return a third product."""
    weights = [numpy_helper.from_array(np.full((64, 64), factor, np.float32), name) for name in "ab"]
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])]
    nodes.append(helper.make_node("Mul", ["y", "c"], ["z"]))
    weights.append(numpy_helper.from_array(np.full(1, factor, np.float32), "c"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in "xz"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    return ir.serde.deserialize_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )


def computed(path):
    """The factor of the model that lies there as a whole."""
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.ones((1, 64), np.float32)})
    (value,) = {float(x) for x in result.ravel()}
    return round((value / 64**2) ** (1 / 3), 3)


def beside(path):
    return [other for other in path.parent.iterdir() if other.name.endswith(".data")]


def age(path):
    for file in beside(path):
        then = file.stat().st_mtime - 2 * GRACE
        os.utime(file, (then, then))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed")
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", [1, 2])
def test_a_process_killed_between_two_renames_leaves_the_old_model_or_the_new_one(call, after, tmp_path):
    path, replace = tmp_path / "m.onnx", os.replace
    save(model(2.0), path)
    child = os.fork()
    if not child:
        count = 0

        def killed(source, target):
            nonlocal count
            # onnx_ir renames files in its own folder, too.
            count += Path(target).parent == tmp_path
            if count == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)

        export_model.os.replace = killed
        save(model(3.0), path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert computed(path) == (3.0 if (call, after) == (2, True) else 2.0)
    # What it left is deleted by the next writer, once it is old.
    age(path)
    for left in tmp_path.iterdir():
        if left.name.endswith(SUFFIX):
            os.utime(left, (0, 0))
    save(model(5.0), path)
    assert computed(path) == 5.0
    assert len(list(tmp_path.iterdir())) == 2


def test_a_rename_that_fails_leaves_no_weights(tmp_path, monkeypatch):
    path, replace = tmp_path / "m.onnx", os.replace
    save(model(2.0), path)
    before = sorted(tmp_path.iterdir())

    def refuse(source, target):
        if os.fspath(target).endswith(".onnx"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(export_model.os, "replace", refuse)
    with pytest.raises(InputError, match=r"cannot write .*m.onnx: No space left on device; choose another"):
        save(model(3.0), path)
    assert sorted(tmp_path.iterdir()) == before
    assert computed(path) == 2.0


@pytest.mark.parametrize("limit", [2**31, 0])
def test_a_full_disk_is_said_and_leaves_the_old_model(limit, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    path = tmp_path / "m.onnx"
    save(model(2.0), path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(export_model, "MAX_BYTES", limit)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A write fails in the middle, as on a disk that is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*m.onnx: .*; choose another place"):
            save(model(3.0), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_weights_of_another_writer_stay_however_long_it_took(tmp_path, monkeypatch):
    path, replace = tmp_path / "m.onnx", os.replace

    def other_between(source, target):
        replace(source, target)
        if Path(target).suffix == ".data" and Path(target).parent == tmp_path:
            # The weights are there, and the model that names them is not: another writer comes and goes.
            monkeypatch.setattr(export_model.os, "replace", replace)
            save(model(5.0), path)

    def slow(_, folder):
        for file in folder.iterdir():
            os.utime(file, (0, 0))

    monkeypatch.setattr(export_model.os, "replace", other_between)
    save(model(3.0), path, slow)
    assert computed(path) == 3.0
    age(path)
    save(model(2.0), path)
    assert computed(path) == 2.0
    assert len(beside(path)) == 1


def test_two_writers_leave_the_model_of_one(tmp_path):
    path, factors = tmp_path / "m.onnx", (2.0, 3.0, 5.0)

    def write(factor):
        for _ in range(5):
            save(model(factor), path)

    writers = [threading.Thread(target=write, args=(factor,)) for factor in factors]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert computed(path) in factors
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(SUFFIX)]
    onnx.checker.check_model(os.fspath(path))
