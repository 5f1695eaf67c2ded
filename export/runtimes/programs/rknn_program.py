"""Compiles a graph with rknn-toolkit2 for Rockchip NPUs and runs the toolkit's simulator."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from protocol import Answer, Array, log, main, request
from rknn.api import RKNN

#: One chip of every generation.
CHIPS = ("rk3588", "rk3576", "rk3568")
#: The toolkit takes the range of a symmetric tensor for [-128, 128] steps and cuts it into 127.
STRETCHED = np.float32(128 / 127)
#: Operators for which the toolkit quantizes constants again, each on its own stretched grid.
REQUANTIZING = ("Concat", "MatMul")
#: Row of the layer table that the compiler prints: number, operator, type, processor ... operator:node.
LAYER = re.compile(r"^D RKNN: \[[^\]]*\] \d+ +(\w+) +(\w+) +([CGN]PU) .* \w+:(\S+) *$", re.MULTILINE)
#: Rows of the table that compute nothing.
ENDS = ("InputOperator", "OutputOperator")


def run(model: Path, feeds: list[dict[str, Array]], folder: Path) -> Iterator[Answer]:
    """Compile for every chip and simulate it."""
    _, keep = request(folder)
    narrowed = folder / "narrowed.onnx"
    onnx.save(with_narrowed_scales(with_own_dequantization(onnx.load(model))), narrowed)
    for chip in CHIPS:
        start = len(log(folder))
        outputs = simulated(chip, narrowed, feeds, folder)
        layers = LAYER.findall(log(folder)[start:])
        answer = {"kept": [f"{chip}.rknn"] if keep else []}
        yield f"{chip}, scales times 127/128", outputs, products(layers), elsewhere(layers), answer


def with_narrowed_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """Divide scales by what the toolkit multiplies them with, so that it compiles the given grids.

    The scales of constants that Add, Sub and Mul read stay as they are: these operators take the
    values that a constant dequantizes to in the file.  An identity of k steps would become
    ``k 127 / 128``, which is one step too few from k = 65 on.  For Concat and MatMul the toolkit
    quantizes constants again, to ``round(q 127 / 128)``.  That is right for small q only, so these
    constants are divided by the greatest common divisor of their values, and their scale is
    multiplied by it.  Every DequantizeLinear must have one reader.
    """
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    readers = {name: node.op_type for node in model.graph.node for name in node.input}
    changed: dict[str, Array] = {}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        values, scale, zero = node.input
        divisor = 1
        if values in constants:
            if readers[node.output[0]] not in REQUANTIZING:
                continue
            integers = constants[values].astype(np.int64) - constants[zero]
            divisor = max(1, int(np.gcd.reduce(integers, axis=None)))
            node.input[0] = f"{values}/{divisor}"
            reduced = integers // divisor + constants[zero]
            changed[node.input[0]] = reduced.astype(constants[values].dtype)
        node.input[1] = f"{scale}/narrowed/{divisor}"
        changed[node.input[1]] = np.asarray(constants[scale] * np.float32(divisor) / STRETCHED)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in changed.items())
    return model


def with_own_dequantization(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give every reader of dequantized integers its own DequantizeLinear.

    The toolkit computes a product in float16 where a float addition follows.  Its compiler
    crashes where one DequantizeLinear feeds both such a product or sum and an int8 operator.
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
