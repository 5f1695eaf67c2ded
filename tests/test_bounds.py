"""What files may make a reader allocate or compute: bounds are checked first."""

import json
import os
import threading
import time
import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from inverse_programs import inverse_program

import qinvert
from qinvert.calibration.data.arrays import FREE_BYTES, read_arrays
from qinvert.calibration.data.documents import MAX_LINE, file_documents
from qinvert.errors import ExportError, InputError, PlanError, ProgramError
from qinvert.files import check_readable, read_bytes
from qinvert.formats import INT8, INT16
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import MATRIX
from qinvert.program.steps import MAX_MACS, MAX_WORK, Axis, Concat, MatMul
from qinvert.stress import stress_matrices


@contextmanager
def cheap(seconds=5.0, megabytes=50):
    """What runs inside takes little time and memory."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        yield
        assert time.monotonic() - start < seconds
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("fmt", [INT8, INT16])
@pytest.mark.parametrize("one", [1e8, 1e10, 1e28])
def test_an_identity_of_endless_blocks_allocates_nothing(fmt, one):
    program = inverse_program(MatMul(output="S", left=MATRIX, right=MATRIX, add=(MATRIX,)))
    scale = float32(1 / one)
    grids = {name: Quantization(format=fmt, scale=scale) for name in program.tensors}
    with cheap(), pytest.raises(PlanError, match=r"accumulator|overflow"):
        LayerPlan(program=program, tensors=grids, requantize=Requantize.MULTIPLIER)


def wide(times):
    """A product whose operands are ``times`` matrices joined along both sizes."""
    steps = [
        Concat(output="row", sources=(MATRIX,) * times, axis=Axis.COLUMNS),
        Concat(output="square", sources=("row",) * times, axis=Axis.ROWS),
        MatMul(output="S", left="row", right="column"),
    ]
    column = Concat(output="column", sources=(MATRIX,) * times, axis=Axis.ROWS)
    product = MatMul(output="large", left="square", right="square")
    return [steps[0], column, steps[1], product, steps[2]]


def test_a_product_may_not_take_far_more_than_one_of_its_inputs():
    with pytest.raises(ProgramError, match=f"a product may take {MAX_WORK} times"):
        inverse_program(*wide(2), chunk=64)
    # Without the large product, the joined operands are legal.
    assert inverse_program(*(step for step in wide(4) if step.output != "large"), chunk=64)


def test_all_products_together_are_bounded():
    longest = qinvert.neumann(1024, 1023)
    assert longest.cost().macs <= MAX_MACS
    first, *others = longest.steps
    more = [MatMul(output=f"more_{i}", left=MATRIX, right=MATRIX) for i in range(4)]
    with pytest.raises(ProgramError, match="multiply-accumulates for one matrix; at most"):
        inverse_program(first, *more, *others, chunk=1024, output=longest.inverse_ports.result)


def test_devices_are_no_files():
    for device in ("/dev/zero", "/dev/full", "/dev/null"):
        if not Path(device).exists():
            pytest.skip("no devices here")
        with cheap(), pytest.raises(PlanError, match=f"{device}.*is a device"):
            Plan.load(device)
        with cheap(), pytest.raises(InputError, match="is a device"):
            qinvert.verify(device, None, None)


def test_readers_of_their_own_are_given_no_devices(tmp_path):
    plan = qinvert.calibrate(stress_matrices("half_random", 4, 16), target="npu-qdq-int8")
    # A link with a name that these readers take.
    (tmp_path / "model.onnx").symlink_to("/dev/zero")
    with cheap(), pytest.raises(InputError, match="is a device"):
        qinvert.graft(tmp_path / "model.onnx", plan, tmp_path / "out.onnx")
    os.mkfifo(tmp_path / "pipe")
    for path, said in (("/dev/zero", "is a device"), (tmp_path / "pipe", "is a folder or a pipe")):
        with cheap(), pytest.raises(InputError, match=f"{said}; pass a file; delete it to start anew"):
            qinvert.calibrate([stress_matrices("half_random", 4, 16)], checkpoint=path)
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path, tmp_path / "none"):
        with cheap(), pytest.raises(InputError, match=r"^cannot read '[^:]*: [^:]*; (pass a file|check)"):
            check_readable(path)
    (tmp_path / "file").write_bytes(bytes(101))
    check_readable(tmp_path / "file", 101)
    check_readable(tmp_path / "file", None)
    with pytest.raises(InputError, match="more than 100 bytes"):
        check_readable(tmp_path / "file", 100)


def test_a_row_without_an_end_is_not_read_as_a_whole(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "short"}\n')
    with rows.open("ab") as file:
        file.truncate(2**40)
    with cheap(megabytes=6 * MAX_LINE // 2**20), pytest.raises(InputError, match="line 2 has more than 67,"):
        list(file_documents(rows, None))


def test_what_is_read_at_once_is_bounded_and_pipes_are_read(tmp_path):
    (tmp_path / "file").write_bytes(bytes(101))
    assert read_bytes(tmp_path / "file", 101) == bytes(101)
    with pytest.raises(InputError, match="more than 100 bytes"):
        read_bytes(tmp_path / "file", 100)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"content",))
    writer.start()
    assert read_bytes(pipe) == b"content"
    writer.join()


def test_archives_that_unpack_to_far_more_are_refused(tmp_path):
    bomb, zeros = tmp_path / "bomb.npz", np.zeros((64, 64, 64), np.float32)
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("L.npy", "w") as member:
        np.lib.format.write_array_header_1_0(
            member, {"descr": "<f4", "fortran_order": False, "shape": (FREE_BYTES // 2**14 + 1, 64, 64)}
        )
        for _ in range(FREE_BYTES // zeros.nbytes + 1):
            member.write(zeros.tobytes())
    with cheap(), pytest.raises(InputError, match="unpack to"):
        read_arrays(bomb)
    # Little may be all zeros, and much may be compressed if it holds something.
    np.savez_compressed(tmp_path / "few.npz", L=zeros)
    assert read_arrays(tmp_path / "few.npz")["L"].shape == zeros.shape


def nested(depth):
    """A model whose functions call the one before twice, around a LinearAttention node."""
    from onnx import TensorProto, helper

    domain, opset = "local", [helper.make_opsetid("", 24), helper.make_opsetid("local", 1)]
    functions = [
        helper.make_function(domain, "f0", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], opset)
    ]
    for i in range(1, depth):
        calls = [
            helper.make_node(f"f{i - 1}", ["x"], ["h"], domain=domain),
            helper.make_node(f"f{i - 1}", ["h"], ["y"], domain=domain),
        ]
        functions.append(helper.make_function(domain, f"f{i}", ["x"], ["y"], calls, opset))
    widths = {"q": 32, "k": 32, "v": 32, "g": 2, "b": 2}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64, w]) for n, w in widths.items()]
    nodes = [
        helper.make_node(f"f{depth - 1}", ["q"], ["q2"], domain=domain),
        helper.make_node(
            "LinearAttention",
            ["q", "k", "v", "", "g", "b"],
            ["o"],
            name="attention",
            domain="com.microsoft",
            q_num_heads=2,
            kv_num_heads=2,
            update_rule="gated_delta",
        ),
    ]
    output = helper.make_tensor_value_info("o", TensorProto.FLOAT, [1, 64, 32])
    graph = helper.make_graph(nodes, "g", inputs, [output])
    imports = [*opset, helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, functions=functions, opset_imports=imports)


@pytest.mark.parametrize("depth", [40, 200])
def test_functions_that_double_at_every_level_are_refused_by_graft(depth, tmp_path):
    import onnx

    from qinvert.export.whole_models.tracing import require_onnx_ir

    # What is imported takes its time, however the model is.
    require_onnx_ir()
    onnx.save(nested(depth), tmp_path / "m.onnx")
    plan = qinvert.calibrate(stress_matrices("half_random", 4, 16), target="npu-qdq-int8")
    with cheap(), pytest.raises(ExportError, match="once it is inlined"):
        qinvert.graft(tmp_path / "m.onnx", plan, tmp_path / "out.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx"]


def test_a_plan_of_many_levels_is_refused_before_it_is_walked(tmp_path):
    (tmp_path / "deep.json").write_text(json.dumps({"a": 0}).replace("0", "[" * 5000 + "]" * 5000))
    with cheap(), pytest.raises(PlanError, match="not a plan file"):
        Plan.load(tmp_path / "deep.json")
