"""The projections of a layer of Qwen3.5-0.8B, as graphs of constant weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from npu_graphs import FLOAT16
from onnx import TensorProto, helper, numpy_helper

#: Rows and columns of the weights that read each input: mixer (q, k and v; gate; beta and decays; output)
#: and MLP (gate, up; down). Convolution, norms and gates between them are left out.
MIXER = (("hidden", 1024, 6144), ("hidden", 1024, 2048), ("hidden", 1024, 32), ("mixed", 2048, 1024))
MLP = (("hidden", 1024, 3584), ("hidden", 1024, 3584), ("inner", 3584, 1024))
PARTS = {"mixer": MIXER, "MLP": MLP}
#: Activations by their width: ONNX type, zero point, and a scale.
ACTIVATIONS = {8: ("uint8", 128, 0.02), 16: ("uint16", 32768, 1e-4)}
#: Largest integer of weights and their scale, by their width.
WEIGHTS = {8: (127, 0.002), 4: (7, 0.03)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Projections:
    """The projections of one part of a layer for one chip."""

    chip: str
    part: str
    #: Bits of activations and of weights; 0 and 0 mean float16.
    activations: int
    weights: int
    chunk: int = 64

    @property
    def key(self) -> str:
        """Name for people who read the cache."""
        return f"projections, {self.part}: {self.title} C={self.chunk}"

    @property
    def title(self) -> str:
        """Both widths."""
        return f"A{self.activations}W{self.weights}" if self.weights else FLOAT16

    @property
    def batch(self) -> int:
        """One call of all tokens."""
        return 8


def projections(case: Projections) -> onnx.ModelProto:
    """Return ``y = x W`` of every weight of a part, ``x [1, C, rows]``, with one scale per column of W."""
    rng, builder = np.random.default_rng(0), _Builder(case)
    for i, (source, rows, columns) in enumerate(PARTS[case.part]):
        builder.product(f"y{i}", source, rng.standard_normal((rows, columns)))
    return builder.model()


class _Builder:
    def __init__(self, case: Projections) -> None:
        self.case = case
        self.inputs: dict[str, onnx.ValueInfoProto] = {}
        self.outputs: list[onnx.ValueInfoProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.quantized = case.weights > 0
        self.element = TensorProto.FLOAT16
        if self.quantized:
            name, zero, scale = ACTIVATIONS[case.activations]
            self.element = helper.np_dtype_to_tensor_dtype(np.dtype(name))
            self.constants += [
                numpy_helper.from_array(np.array(scale, np.float32), "scale"),
                numpy_helper.from_array(np.array(zero, name), "zero"),
            ]

    def product(self, name: str, source: str, weight: np.ndarray) -> None:
        rows, columns = weight.shape
        left = self._input(source, rows)
        right = self._weight(f"{name}/weight", weight)
        result = f"{name}/float" if self.quantized else name
        self.nodes.append(helper.make_node("MatMul", [left, right], [result], f"{name}/product"))
        if self.quantized:
            self.nodes.append(helper.make_node("QuantizeLinear", [result, "scale", "zero"], [name], name))
        self.outputs.append(helper.make_tensor_value_info(name, self.element, [1, self.case.chunk, columns]))

    def _input(self, name: str, rows: int) -> str:
        real = f"{name}/real" if self.quantized else name
        if name not in self.inputs:
            shape = [1, self.case.chunk, rows]
            self.inputs[name] = helper.make_tensor_value_info(name, self.element, shape)
            if self.quantized:
                self.nodes.append(helper.make_node("DequantizeLinear", [name, "scale", "zero"], [real], real))
        return real

    def _weight(self, name: str, weight: np.ndarray) -> str:
        if not self.quantized:
            self.constants.append(numpy_helper.from_array((0.03 * weight).astype(np.float16), name))
            return name
        largest, scale = WEIGHTS[self.case.weights]
        columns = weight.shape[1]
        integers = np.clip(np.round(weight * largest / 3), -largest, largest).astype(np.int8)
        self.constants += [
            _integers(f"{name}/integers", integers, self.case.weights),
            numpy_helper.from_array(np.full(columns, scale, np.float32), f"{name}/scale"),
            _integers(f"{name}/zero", np.zeros(columns, np.int8), self.case.weights),
        ]
        given = [f"{name}/integers", f"{name}/scale", f"{name}/zero"]
        self.nodes.append(helper.make_node("DequantizeLinear", given, [name], name, axis=1))
        return name

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "projections", list(self.inputs.values()), self.outputs, self.constants
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model)
        return model


def _integers(name: str, values: np.ndarray, bits: int) -> onnx.TensorProto:
    if bits == 8:
        return numpy_helper.from_array(values, name)
    flat = np.append(values.ravel(), np.zeros(values.size % 2, np.int8)) & 15
    packed = (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8)
    return helper.make_tensor(name, TensorProto.INT4, list(values.shape), packed.tobytes(), raw=True)
