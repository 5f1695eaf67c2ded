from dataclasses import replace

import onnx
import onnxruntime
import pytest
from added_modules import added

import qinvert
from qinvert.errors import ExportError
from qinvert.export import lowering
from qinvert.export.exporting import build
from qinvert.export.lowering import find_lowering
from qinvert.export.lowering.integer import IntegerLowering
from qinvert.export.lowering.qdq import QdqLowering
from qinvert.export.lowering.qlinear import QLinearLowering
from qinvert.export.lowering.qlinear_uint8 import UnsignedLowering
from qinvert.profiles import PROFILES
from qinvert.stress import stress_matrices

TOY = '''
"""As the integer lowering, with Cast and Mul in place of DequantizeLinear."""

from onnx import TensorProto

from qinvert.export.lowering.integer import IntegerLowering


class ToyLowering(IntegerLowering):
    def finish(self, name, result):
        shape = self.shape(result.tensor)
        real = self.graph.node("Cast", [result.name], f"{name}/real", shape, to=TensorProto.FLOAT)
        return self.graph.node("Mul", [real, self.scale_of(self.plan.output)], name, shape)


LOWERING = ToyLowering
'''
OWN = {
    "integer": IntegerLowering,
    "qdq": QdqLowering,
    "qlinear": QLinearLowering,
    "qlinear_uint8": UnsignedLowering,
}
LOWER = stress_matrices("correlated_keys", 8, 16)


@pytest.fixture
def plan():
    return qinvert.calibrate(LOWER, method=qinvert.block_merge(16, base=4), target="int-ops")


@pytest.fixture
def toy_profile(monkeypatch):
    profile = replace(PROFILES["int-ops"], name="toy-ops", lowering="toy")
    monkeypatch.setitem(PROFILES, "toy-ops", profile)


def kinds(model):
    return [node.op_type for node in model.graph.node]


def test_the_lowerings_are_the_modules_that_define_one():
    assert lowering.discover() == OWN
    assert all(find_lowering(name) is kind for name, kind in OWN.items())
    assert {profile.lowering for profile in PROFILES.values()} == OWN.keys()


def test_a_lowering_of_one_file_exports_a_graph_that_runs(toy_profile, plan, tmp_path):
    with added("qinvert.export.lowering", tmp_path, toy=TOY):
        assert lowering.discover().keys() == {*OWN, "toy"}
        model = qinvert.export(plan, tmp_path / "t.onnx", profile="toy-ops")
        for result in qinvert.verify(tmp_path / "t.onnx", plan, 3 * LOWER):
            assert (result.exact, result.mismatches) == (True, 0)
    assert "DequantizeLinear" in kinds(build(plan))
    assert "DequantizeLinear" not in kinds(model)
    session = onnxruntime.InferenceSession(tmp_path / "t.onnx", providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"L": LOWER[None].numpy()})
    assert (result[0] == plan.layer().inverse(LOWER).numpy()).all()
    assert onnx.load(tmp_path / "t.onnx") == model


def test_a_lowering_that_does_not_exist_lists_those_that_do(toy_profile, plan, tmp_path):
    legal = rf"{', '.join(OWN)}, or add a module to qinvert\.export\.lowering that defines LOWERING"
    with pytest.raises(ExportError, match=f"unknown lowering 'toy'; use one of {legal}"):
        qinvert.export(plan, tmp_path / "t.onnx", profile="toy-ops")
    with pytest.raises(ExportError, match="unknown lowering 'base'; use one of"):
        find_lowering("base")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["'qdq'", "object", "1"])
def test_something_else_that_a_module_calls_its_lowering_is_refused(value, tmp_path):
    message = r"lowering\.toy has the LOWERING .*; make it a subclass of GraphLowering"
    with (
        added("qinvert.export.lowering", tmp_path, toy=f"LOWERING = {value}"),
        pytest.raises(ExportError, match=message),
    ):
        find_lowering("qdq")
    assert find_lowering("qdq") is QdqLowering
