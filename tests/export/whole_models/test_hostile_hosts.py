"""Models that graft refuses in its own words, before anything is traced."""

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qinvert.errors import ExportError, InputError
from qinvert.export.whole_models.linear_attention_nodes import find_nodes, load
from qinvert.files import check_target

WIDTHS = {"query": 32, "key": 32, "value": 32, "decay": 2, "beta": 2}


def host():
    node = helper.make_node(
        "LinearAttention",
        ["query", "key", "value", "", "decay", "beta"],
        ["output"],
        name="attention",
        domain="com.microsoft",
        q_num_heads=2,
        kv_num_heads=2,
        update_rule="gated_delta",
        scale=0.5,
    )
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "T", width])
        for name, width in WIDTHS.items()
    ]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["B", "T", 32])]
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "a_graph", inputs, outputs)
    return helper.make_model(graph, opset_imports=versions, ir_version=10)


def read(content, folder):
    (folder / "m.onnx").write_bytes(content)
    return find_nodes(load(folder / "m.onnx"))


def test_the_host_itself_is_read(tmp_path):
    (node,) = read(host().SerializeToString(), tmp_path).values()
    assert (node.query_heads, node.key_size, node.scale) == (2, 16, 0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q_num_heads", "2"),
        ("q_num_heads", 2.0),
        ("q_num_heads", [2]),
        ("kv_num_heads", b"x"),
        ("scale", "x"),
        ("scale", [1.0]),
        ("state_window", "x"),
        ("scale", float("nan")),
        ("update_rule", 1),
    ],
)
def test_attributes_of_another_type_are_refused(name, value, tmp_path):
    model = host()
    kept = [attribute for attribute in model.graph.node[0].attribute if attribute.name != name]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend([*kept, helper.make_attribute(name, value)])
    with pytest.raises(ExportError, match=r"must be|not finite|no LinearAttention node"):
        read(model.SerializeToString(), tmp_path)


@pytest.mark.parametrize("text", [b"attention", b"query", b"a_graph", b"output", b"com.microsoft"])
def test_names_that_are_no_text_are_refused(text, tmp_path):
    content = host().SerializeToString().replace(text, text[:-1] + b"\xff")
    with pytest.raises(ExportError, match="is not UTF-8 text"):
        read(content, tmp_path)


def test_a_name_of_a_model_that_is_no_text_is_refused_before_the_work(tmp_path):
    with pytest.raises(InputError, match=r"file name b'.\\xff.onnx' is not UTF-8 text"):
        check_target(tmp_path / os.fsdecode(b"m\xff.onnx"))
    check_target(tmp_path / "\u00e4.onnx")
    assert not list(tmp_path.iterdir())


def element(number):
    def change(model):
        model.graph.input[0].type.tensor_type.elem_type = number

    return change


def width(number):
    def change(model):
        for value in model.graph.input[:3]:
            value.type.tensor_type.shape.dim[2].dim_value = number

    return change


def written_twice(model):
    model.graph.node.append(helper.make_node("Identity", ["query"], ["output"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (element(99), "element type 99; FLOAT, FLOAT16, BFLOAT16 can be traced"),
        (element(TensorProto.DOUBLE), "element type 11"),
        (width(2**40), "do not fit"),
        (width(-32), "do not fit"),
        (written_twice, "single static assignment"),
        (lambda model: model.graph.node[0].input.__setitem__(0, "nowhere"), "nowhere"),
        (lambda model: model.graph.node[0].input.__delitem__(slice(None)), "no input query"),
        (lambda model: model.graph.node[0].output.__delitem__(slice(None)), "is not an output of any node"),
        (lambda model: setattr(model.opset_import[0], "version", 2**40), "out of supported range"),
        (lambda model: model.opset_import.__delitem__(slice(None)), "opset_import"),
    ],
)
def test_what_no_runtime_would_take_is_refused(change, message, tmp_path):
    model = host()
    change(model)
    with pytest.raises(ExportError, match=message):
        read(model.SerializeToString(), tmp_path)


def test_large_weights_are_not_copied_for_the_check(tmp_path):
    model = host()
    weights = numpy_helper.from_array(np.ones((64, 64), np.float32), "weights")
    model.graph.initializer.append(weights)
    model.graph.node.append(helper.make_node("MatMul", ["weights", "weights"], ["unused"]))
    onnx.save(model, tmp_path / "m.onnx")
    assert find_nodes(load(tmp_path / "m.onnx"))
