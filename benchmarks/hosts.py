"""A model with a LinearAttention node, as others export it."""

from __future__ import annotations

from onnx import TensorProto, helper


def host() -> bytes:
    """Return the model, whose keys have 16 entries."""
    widths = {"query": 32, "key": 32, "value": 32, "decay": 2, "beta": 2}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "T", width])
        for name, width in widths.items()
    ]
    names = ["query", "key", "value", "", "decay", "beta"]
    options = {"q_num_heads": 2, "kv_num_heads": 2, "update_rule": "gated_delta", "scale": 0.5}
    node = helper.make_node(
        "LinearAttention", names, ["output"], name="attention", domain="com.microsoft", **options
    )
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["B", "T", 32])
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "host", inputs, [output])
    content: bytes = helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()
    return content
