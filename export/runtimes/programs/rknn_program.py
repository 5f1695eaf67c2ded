"""Compiles a graph with rknn-toolkit2 for Rockchip NPUs and runs the toolkit's simulator."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from protocol import Array, Outcome, log, main
from rknn.api import RKNN

#: One chip of every generation.
CHIPS = ("rk3588", "rk3576", "rk3568")
#: The toolkit takes the range of a symmetric tensor for [-128, 128] steps and cuts it into 127.
STRETCHED = np.float32(128 / 127)
#: Row of the layer table that the compiler prints: number, operator, type, processor ... operator:node.
LAYER = re.compile(r"^D RKNN: \[[^\]]*\] \d+ +(\w+) +(\w+) +([CGN]PU) .* \w+:(\S+) *$", re.MULTILINE)
#: Rows of the table that compute nothing.
ENDS = ("InputOperator", "OutputOperator")


def run(model: Path, feeds: list[dict[str, Array]], folder: Path) -> Iterator[Outcome]:
    """Compile for every chip and simulate it."""
    narrowed = folder / "narrowed.onnx"
    onnx.save(with_own_dequantization(with_narrowed_scales(onnx.load(model))), narrowed)
    for chip in CHIPS:
        start = len(log(folder))
        outputs = simulated(chip, narrowed, feeds, folder)
        layers = LAYER.findall(log(folder)[start:])
        yield f"{chip}, scales times 127/128", outputs, products(layers), elsewhere(layers)


def with_narrowed_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """Divide the scale of every computed tensor by what the toolkit multiplies it with.

    Constants keep theirs: in Add, Mul and Concat the toolkit takes the values that they dequantize to
    in the file.  Of k steps, ``k 127 / 128`` would be left with a narrowed scale: one too few in an
    identity of 65 steps or more.  Only a product's constant operand has its scale stretched as well;
    no graph here has one.
    """
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    changed: dict[str, Array] = {}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] not in constants:
            scale = node.input[1]
            node.input[1] = f"{scale}/narrowed"
            changed[node.input[1]] = np.asarray(constants[scale] / STRETCHED)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in changed.items())
    return model


def with_own_dequantization(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give every reader of dequantized integers a DequantizeLinear of its own.

    The toolkit computes a product in float16 where a float addition follows.  Its compiler
    crashes where one DequantizeLinear feeds such a product or sum and an int8 operator, too.
    """
    dequantize = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    returned = {output.name for output in model.graph.output}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += own_dequantizations(node, dequantize)
        if node.output[0] not in dequantize or node.output[0] in returned:
            nodes.append(node)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed


def own_dequantizations(
    reader: onnx.NodeProto, dequantize: dict[str, onnx.NodeProto]
) -> list[onnx.NodeProto]:
    """Copy the DequantizeLinear of each input of a node and let the node read the copies."""
    copies = []
    for i, name in enumerate(reader.input):
        if name in dequantize:
            copy = onnx.NodeProto()
            copy.CopyFrom(dequantize[name])
            copy.name = copy.output[0] = reader.input[i] = f"{name}/{reader.output[0]}/{i}"
            copies.append(copy)
    return copies


def simulated(chip: str, model: Path, feeds: list[dict[str, Array]], folder: Path) -> list[Array]:
    """Compile for one chip and return what its simulator computes."""
    toolkit = RKNN(verbose=True)
    toolkit.config(target_platform=chip)
    done(toolkit.load_onnx(model=str(model)), "load_onnx")
    done(toolkit.build(do_quantization=False), "build")
    done(toolkit.export_rknn(str(folder / f"{chip}.rknn")), "export_rknn")
    done(toolkit.init_runtime(), "init_runtime")
    outputs = [
        toolkit.inference(inputs=list(feed.values()), data_format=["nchw"] * len(feed))[0] for feed in feeds
    ]
    toolkit.release()
    return outputs


def done(code: int, call: str) -> None:
    """Turn the toolkit's return codes into errors."""
    if code != 0:
        raise RuntimeError(f"RKNN.{call} returned {code}")


def products(layers: list[tuple[str, str, str, str]]) -> dict[str, str]:
    """Operator, type and processor of every product in the layer table."""
    return {
        name: f"{operator} {element} {unit}"
        for operator, element, unit, name in layers
        if "MatMul" in operator
    }


def elsewhere(layers: list[tuple[str, str, str, str]]) -> list[str]:
    """Nodes that the table does not give to the NPU."""
    return [name for operator, _, unit, name in layers if unit != "NPU" and operator not in ENDS]


if __name__ == "__main__":
    main(run)
