"""What the rknn program gives the toolkit, without the toolkit: its measured law is written here."""

import copy
import runpy
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import qinvert
from qinvert.export.runtimes.subprocesses import PROGRAMS
from qinvert.stress import STRESS, stress_matrices

GRIDS = ("QuantizeLinear", "DequantizeLinear")


@pytest.fixture
def program(monkeypatch):
    """Return the functions of the program; nothing in them calls the toolkit."""
    toolkit, protocol = ModuleType("rknn.api"), ModuleType("protocol")
    toolkit.RKNN = None
    vars(protocol).update(runpy.run_path(PROGRAMS / "protocol.py"))
    monkeypatch.setitem(sys.modules, "rknn.api", toolkit)
    monkeypatch.setitem(sys.modules, "protocol", protocol)
    return SimpleNamespace(**runpy.run_path(PROGRAMS / "rknn_program.py"))


@pytest.fixture
def narrowed(program):
    """Return the function of the program that rewrites scales, on a copy."""
    return lambda model: program.with_narrowed_scales(copy.deepcopy(model))


def arrays(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def scaled(model, factor, of_constants):
    """Return a copy in which constants, or all other tensors, have their scales times ``factor``."""
    model = copy.deepcopy(model)
    constants = arrays(model)
    for i, node in enumerate(model.graph.node):
        if node.op_type in GRIDS and (node.input[0] in constants) == of_constants:
            scale = np.asarray(constants[node.input[1]] * factor, dtype=np.float32)
            node.input[1] = f"{i}/scale"
            model.graph.initializer.append(numpy_helper.from_array(scale, node.input[1]))
    return model


def compiled(model):
    """Return what the toolkit makes of a graph: constants are floats, all other grids are stretched."""
    return scaled(model, 128 / 127, of_constants=False)


def outputs(model, lower):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"L": lower[None].numpy()})[0]


@pytest.mark.parametrize("method", ["packed", "corrected"])
@pytest.mark.parametrize("scales", ["float", "pow2"])
def test_the_toolkit_compiles_the_grids_of_the_plan(scales, method, narrowed, tmp_path):
    lower = torch.cat([stress_matrices(name, 2, 16, seed=7) for name in STRESS])
    program = qinvert.block_merge(16, base=4, corrections=int(method == "corrected"))
    plan = qinvert.calibrate(lower, method=program, target="npu-qdq-int8", scales=scales)
    qinvert.export(plan, tmp_path / "t.onnx", batch=len(lower))
    model = onnx.load(tmp_path / "t.onnx")
    wanted = outputs(model, lower)

    def steps(given):
        return np.rint((outputs(compiled(given), lower) - wanted) / plan.layer().output.scale)

    assert not steps(narrowed(model)).any()
    # The law matters: as it is, the graph has other grids ...
    assert steps(model).any()
    # ... and a constant whose scale is narrowed, too, is another integer.
    assert steps(scaled(narrowed(model), 127 / 128, of_constants=True)).any() == (scales == "float")


def test_constants_keep_their_values_and_their_scales(narrowed, tmp_path):
    lower = torch.cat([stress_matrices(name, 1, 16, seed=7) for name in STRESS])
    plan = qinvert.calibrate(lower, method=qinvert.block_merge(16, base=4), target="npu-qdq-int8")
    qinvert.export(plan, tmp_path / "t.onnx", batch=2)
    model = onnx.load(tmp_path / "t.onnx")
    before, after = arrays(model), narrowed(model)
    now = arrays(after)
    assert all(np.array_equal(now[name], array) for name, array in before.items())
    kinds = set()
    for old, new in zip(model.graph.node, after.graph.node, strict=True):
        if old.op_type not in GRIDS:
            assert old == new
            continue
        constant = old.input[0] in before
        kinds.add(constant)
        ratio = np.float64(now[new.input[1]]) / before[old.input[1]]
        assert ratio == pytest.approx(1.0 if constant else 127 / 128, rel=1e-6)
        assert [old.input[0], old.input[2]] == [new.input[0], new.input[2]]
    assert kinds == {True, False}


@pytest.mark.parametrize("target", ["npu-qdq-int8", "npu-qdq-int4"])
def test_no_two_operators_read_one_dequantization(target, program, tmp_path):
    lower = torch.cat([stress_matrices(name, 2, 16, seed=7) for name in STRESS])
    plan = qinvert.calibrate(
        lower, method=qinvert.block_merge(16, base=4), target=target, bits=int(target[-1])
    )
    qinvert.export(plan, tmp_path / "t.onnx", batch=len(lower))
    model = onnx.load(tmp_path / "t.onnx")
    wanted, others = outputs(model, lower), [node for node in model.graph.node if node.op_type not in GRIDS]
    assert max(readers(model).values()) > 1

    changed = program.with_own_dequantization(copy.deepcopy(model))

    onnx.checker.check_model(changed, full_check=True)
    assert set(readers(changed).values()) == {1}
    assert [node.output for node in changed.graph.node if node.op_type not in GRIDS] == [
        node.output for node in others
    ]
    assert np.array_equal(outputs(changed, lower), wanted)


def readers(model):
    """How often each dequantized tensor is read."""
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return Counter(name for node in model.graph.node for name in node.input if name in dequantized)
