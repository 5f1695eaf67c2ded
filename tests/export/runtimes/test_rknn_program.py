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
def given(program):
    """Return what the program gives the toolkit for a model."""
    return lambda model: program.with_narrowed_scales(program.with_own_dequantization(copy.deepcopy(model)))


def arrays(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def operator(model, node):
    """The operator that reads a DequantizeLinear of a constant."""
    return next(reader.op_type for reader in model.graph.node if node.output[0] in reader.input)


def compiled(model):
    """Return what the toolkit makes of a graph: all grids are stretched, but those of constants in Add."""
    model, constants = copy.deepcopy(model), arrays(model)
    for i, node in enumerate(node for node in model.graph.node if node.op_type in GRIDS):
        if node.input[0] in constants:
            if operator(model, node) not in ("Concat", "MatMul"):
                continue
            shrunk = np.rint(constants[node.input[0]] * (127 / 128)).astype(np.int8)
            node.input[0] = f"{i}/integers"
            model.graph.initializer.append(numpy_helper.from_array(shrunk, node.input[0]))
        scale = np.asarray(constants[node.input[1]] * (128 / 127), dtype=np.float32)
        node.input[1] = f"{i}/scale"
        model.graph.initializer.append(numpy_helper.from_array(scale, node.input[1]))
    return model


def outputs(model, lower):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"L": lower[None].numpy()})[0]


def exported(folder, scales="float", corrections=0, target="npu-qdq-int8"):
    lower = torch.cat([stress_matrices(name, 2, 16, seed=7) for name in STRESS])
    method = qinvert.block_merge(16, base=4, corrections=corrections)
    plan = qinvert.calibrate(lower, method=method, target=target, bits=int(target[-1]), scales=scales)
    qinvert.export(plan, folder / "t.onnx", batch=len(lower))
    return onnx.load(folder / "t.onnx"), plan.layer(), lower


@pytest.mark.parametrize("corrections", [0, 1])
@pytest.mark.parametrize("scales", ["float", "pow2"])
def test_the_toolkit_compiles_the_grids_of_the_plan(scales, corrections, given, program, tmp_path):
    model, plan, lower = exported(tmp_path, scales, corrections)
    wanted = outputs(model, lower)

    def steps(changed):
        return np.rint((outputs(compiled(changed), lower) - wanted) / plan.output.scale)

    assert not steps(given(model)).any()
    # The law matters: as it is, the graph has other grids.
    assert steps(program.with_own_dequantization(copy.deepcopy(model))).any()


def test_an_identity_of_many_steps_keeps_them_all(given, tmp_path):
    model, plan, _ = exported(tmp_path, corrections=1)
    changed, seen = given(model), set()
    assert plan.output.one > 64
    constants = arrays(changed)
    for node in changed.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in constants:
            continue
        reader, integers = operator(changed, node), constants[node.input[0]]
        scale = float(constants[node.input[1]])
        seen.add(reader)
        if reader in ("Concat", "MatMul"):
            assert np.array_equal(np.rint(integers * (127 / 128)), integers)
            scale *= 128 / 127
        ones = float(np.abs(integers).max()) * scale
        assert ones == 0 or ones == pytest.approx(1.0, abs=1e-6)
    assert seen == {"Add", "Concat"}


@pytest.mark.parametrize("target", ["npu-qdq-int8", "npu-qdq-int4"])
def test_no_two_operators_read_one_dequantization(target, program, tmp_path):
    model, _, lower = exported(tmp_path, target=target)
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
