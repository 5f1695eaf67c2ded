"""The comparison of a grafted model with its host."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import qinvert
from qinvert import InputError, VerificationError
from qinvert.cli.app import cli
from qinvert.export.whole_models import graft_check
from qinvert.export.whole_models.graft_check import TOKENS, compare_graft, drawn
from qinvert.stress import stress_matrices

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript", reason="pip install 'qinvert[model]'")
pytestmark = pytest.mark.filterwarnings("ignore")

HEADS, KEY, VALUE, CHUNK, ROWS = 2, 8, 8, 8, 5
WIDTHS = {"query": HEADS * KEY, "key": HEADS * KEY, "value": HEADS * VALUE, "decay": HEADS, "beta": HEADS}


def host():
    """A node whose queries are looked up by token ids, beside a mask and positions that are handed on."""
    shapes = {name: ("B", "T", width) for name, width in WIDTHS.items() if name != "query"}
    shapes["past_state"] = ("B", "H", "K", "V")
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    handed = ("input_ids", "attention_mask", "position_ids")
    given += [helper.make_tensor_value_info(name, TensorProto.INT64, ("B", "T")) for name in handed]
    table = np.random.default_rng(0).standard_normal((ROWS, HEADS * KEY)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["query"]),
        helper.make_node(
            "LinearAttention",
            ["query", "key", "value", "past_state", "decay", "beta"],
            ["output", "present_state"],
            name="attention",
            domain="com.microsoft",
            q_num_heads=HEADS,
            kv_num_heads=HEADS,
            update_rule="gated_delta",
        ),
        helper.make_node("Add", ["attention_mask", "position_ids"], ["counted"]),
    ]
    results = {"output": TensorProto.FLOAT, "present_state": TensorProto.FLOAT, "counted": TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "host",
        given,
        [helper.make_tensor_value_info(name, element, None) for name, element in results.items()],
        [numpy_helper.from_array(table, "table")],
        value_info=[helper.make_tensor_value_info("query", TensorProto.FLOAT, ("B", "T", HEADS * KEY))],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graft")
    plan = qinvert.calibrate(stress_matrices("independent_keys", 8, CHUNK), bits=8)
    plan.save(folder / "plan.json")
    onnx.save(host(), folder / "in.onnx")
    arguments = ["graft", "in.onnx", "plan.json", "-o", "out.onnx"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        said, result = (CliRunner().invoke(cli, [*arguments, *end]) for end in ([], ["--json"]))
    assert (said.exit_code, result.exit_code) == (0, 0), said.output + result.output
    return folder, said.stdout, json.loads(result.stdout)


def changed(model, factor):
    """Return a model whose output is multiplied."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    for node in other.graph.node:
        node.output[:] = ["before" if name == "output" else name for name in node.output]
    other.graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), "factor"))
    other.graph.node.append(helper.make_node("Mul", ["before", "factor"], ["output"]))
    return other


def test_the_command_says_in_one_line_what_python_returns(files):
    folder, said, result = files
    found = compare_graft(folder / "in.onnx", folder / "out.onnx")
    assert result["differences"] == pytest.approx(found)
    assert found["counted"] == 0
    assert 0 < found["output"] < 0.1
    assert 0 < found["present_state"] < 0.1
    line = said.splitlines()[-1]
    assert line.startswith(f"{TOKENS} random tokens: outputs differ from those of in.onnx by at most")
    assert f"{max(found.values()):.1e}" in line


def test_the_difference_is_the_share_of_the_hosts_norm(tmp_path):
    onnx.save(host(), tmp_path / "in.onnx")
    onnx.save(changed(host(), 0.75), tmp_path / "out.onnx")
    found = compare_graft(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert found == {"output": pytest.approx(0.25, rel=1e-5), "present_state": 0, "counted": 0}
    onnx.save(changed(host(), np.nan), tmp_path / "out.onnx")
    assert np.isnan(compare_graft(tmp_path / "in.onnx", tmp_path / "out.onnx")["output"])


def test_inputs_are_drawn_for_what_they_mean():
    given = drawn(host())
    norms = np.linalg.norm(given["key"].reshape(-1, KEY), axis=-1)
    assert norms == pytest.approx(np.ones(TOKENS * HEADS), rel=1e-5)
    assert (given["decay"] <= 0).all()
    assert ((given["beta"] > 0) & (given["beta"] < 1)).all()
    assert set(given["input_ids"].flat) == set(range(ROWS))
    assert (given["attention_mask"] == 1).all()
    assert np.array_equal(given["position_ids"], np.arange(TOKENS)[None])
    assert given["past_state"].shape == (1, HEADS, KEY, VALUE)


def test_inputs_may_be_given_and_are_refused_where_they_do_not_fit(files):
    folder, *_ = files
    paths, given = (folder / "in.onnx", folder / "out.onnx"), drawn(host())
    short = {name: x if name == "past_state" else x[:, :3] for name, x in given.items()}
    assert compare_graft(*paths, short) != compare_graft(*paths)
    del short["key"]
    with pytest.raises(InputError, match=r"cannot run .*in\.onnx .*inputs="):
        compare_graft(*paths, short)


def test_another_shape_is_an_error_and_no_runtime_is_a_line(tmp_path, monkeypatch):
    model = host()
    onnx.save(model, tmp_path / "in.onnx")
    model.graph.node.append(helper.make_node("Flatten", ["flat"], ["output"]))
    model.graph.node[1].output[0] = "flat"
    onnx.save(model, tmp_path / "out.onnx")
    with pytest.raises(VerificationError, match=r"'output' is float32 \[1, 1280\] after graft"):
        compare_graft(tmp_path / "in.onnx", tmp_path / "out.onnx")
    monkeypatch.setattr(graft_check, "can_run", lambda: False)
    from qinvert.cli.graft import compared

    found, line = compared("in.onnx", "out.onnx")
    assert found == {}
    assert line.startswith("not compared with in.onnx: ")
    assert "pip install onnxruntime" in line
