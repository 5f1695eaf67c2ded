import onnx
import pytest
from added_modules import added

import qinvert
from qinvert.errors import ExportError
from qinvert.profiles import PROFILES, find_profile
from qinvert.stress import stress_matrices

TOY = '''
"""A profile as a user would write it."""

from qinvert.formats import INT8
from qinvert.plan.quantization import Requantize
from qinvert.profiles._profile import Profile

PROFILE = Profile(
    name="toy-ops",
    summary="MatMulInteger at an older operator set",
    lowering="integer",
    quantized_everywhere=False,
    exact=True,
    opset=18,
    formats=(INT8,),
    requantize=Requantize.DIVIDE,
    operators=frozenset(
        {"QuantizeLinear", "DequantizeLinear", "MatMulInteger", "Cast", "Mul", "Add", "Sub"}
        | {"Slice", "Concat", "BitwiseAnd"}
    ),
    proved=("onnxruntime",),
    caveats="for a test",
)
'''
LOWER = stress_matrices("correlated_keys", 8, 16)


@pytest.fixture
def toy(tmp_path):
    with added("qinvert.profiles", tmp_path, toy=TOY) as package:
        yield package.discover()["toy-ops"]


def test_a_profile_of_one_file_is_a_target_and_a_form_of_graphs(toy, tmp_path):
    method = qinvert.block_merge(16, base=4)
    plan = qinvert.calibrate(LOWER, method=method, target="toy-ops")
    model = qinvert.export(plan, tmp_path / "t.onnx")
    assert model.opset_import[0].version == 18
    assert {node.op_type for node in model.graph.node} <= toy.operators
    for result in qinvert.verify(tmp_path / "t.onnx", plan, LOWER):
        assert (result.exact, result.mismatches) == (True, 0)
    other = qinvert.calibrate(LOWER, method=method, target="int-ops", bits=8)
    assert qinvert.export(other, tmp_path / "o.onnx", profile="toy-ops").opset_import[0].version == 18


def test_rules_hold_graphs_to_the_flags_of_the_profile(tmp_path):
    plan = qinvert.calibrate(LOWER, method=qinvert.block_merge(16, base=4), target="int-ops", bits=8)
    strict = TOY.replace("quantized_everywhere=False", "quantized_everywhere=True")
    with added("qinvert.profiles", tmp_path, toy=strict) as package:
        package.discover()
        with pytest.raises(ExportError, match=r"breaks a rule of profile 'toy-ops': .* unquantized"):
            qinvert.export(plan, tmp_path / "t.onnx", profile="toy-ops")
    assert not (tmp_path / "t.onnx").exists()


def test_a_graph_names_its_profile_until_the_profile_is_gone(tmp_path):
    before = dict(PROFILES)
    with added("qinvert.profiles", tmp_path, toy=TOY) as package:
        package.discover()
        assert PROFILES.keys() - before.keys() == {"toy-ops"}
        plan = qinvert.calibrate(LOWER, target="toy-ops")
        qinvert.export(plan, tmp_path / "t.onnx")
    assert list(PROFILES.items()) == list(before.items())
    entries = {e.key: e.value for e in onnx.load(tmp_path / "t.onnx").metadata_props}
    assert "toy-ops" in entries.values()
    with pytest.raises(ExportError, match=r"unknown profile 'toy-ops'; use one of .*int-ops, "):
        qinvert.export(plan, tmp_path / "t.onnx")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", r"qinvert\.profiles\.toy defines no PROFILE of type Profile; add PROFILE = Profile"),
        ("PROFILE = 'toy-ops'", r"qinvert\.profiles\.toy defines no PROFILE"),
        (
            "from qinvert.profiles.qlinear import PROFILE",
            r"qlinear and .*\.toy both define 'qlinear'; rename",
        ),
        (TOY.replace("toy-ops", "Toy ops"), r"profile name 'Toy ops' is not lower-case words joined by '-'"),
        (
            TOY.replace('"integer"', '"not a module"'),
            r"'toy-ops' has the lowering 'not a module', which does",
        ),
        (TOY.replace("(INT8,)", "()"), r"'toy-ops' needs at least one format"),
        (TOY.replace("opset=18", "opset=0"), r"opset 0 is not in \[1, 99\]; see profile 'toy-ops'"),
        (
            TOY.replace("exact=True", "exact=True, accumulator_limit=2**31"),
            r"accumulator_limit 2147483648 is",
        ),
    ],
)
def test_a_module_that_is_no_profile_is_refused_and_changes_nothing(source, message, tmp_path):
    before = dict(PROFILES)
    with added("qinvert.profiles", tmp_path, toy=source) as package:
        with pytest.raises(ExportError, match=message):
            package.discover()
        assert list(PROFILES.items()) == list(before.items())


def test_every_profile_is_found_by_its_name():
    assert list(PROFILES) == [profile.name for profile in PROFILES.values()]
    assert all(find_profile(name) is profile for name, profile in PROFILES.items())
