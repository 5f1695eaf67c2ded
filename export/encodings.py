"""The scales of a QDQ graph as the JSON files that other toolchains read.

Tools that drop QuantizeLinear and DequantizeLinear from a graph want the
scales in a file, by the names of the float tensors that remain.  These are the
tensors that QuantizeLinear reads, and those that DequantizeLinear makes of a
constant or returns from the graph.  Where a graph splits a 16-bit operand into
two planes, the planes have their own entries, but the split itself is lost
with its nodes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx

from qinvert.errors import ExportError, lookup
from qinvert.export.rules.graph_index import Grid, Structure
from qinvert.version import __version__

#: What a style makes of the quantized tensors.
Writer = Callable[[Mapping[str, "Encoding"]], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How one float tensor is quantized."""

    #: Scale, zero point and container.
    grid: Grid
    #: Whether the tensor is a constant.
    constant: bool

    @property
    def bits(self) -> int:
        """Bits of the container."""
        return int(np.iinfo(self.grid.element).bits)

    @property
    def offset(self) -> int:
        """Minus the zero point on the unsigned grid of as many bits: -128 for int8."""
        return int(np.iinfo(self.grid.element).min) - self.grid.zero_point


def encodings(model: onnx.ModelProto, style: str) -> dict[str, Any]:
    """Return the scales of every quantized tensor of a QDQ graph, as JSON types.

    Parameters
    ----------
    model : onnx.ModelProto
        Exported under a QDQ profile.
    style : {"aimet-2.0.0", "aimet-1.0.0", "ort"}
        AIMET encodings of that version, or onnxruntime's
        ``TensorQuantOverrides``.

    Raises
    ------
    ExportError
        If the style is unknown, or the graph has no QuantizeLinear and
        DequantizeLinear around float operators.
    """
    write = lookup(STYLES, style, "encodings style", ExportError)
    return write(find_encodings(model))


def to_bytes(document: Mapping[str, Any]) -> bytes:
    """Return the file content; equal documents give equal bytes."""
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


def find_encodings(model: onnx.ModelProto) -> dict[str, Encoding]:
    """Return the encoding of every float tensor that the graph quantizes, in the order of its nodes.

    Raises
    ------
    ExportError
        If the graph multiplies integers, or a grid is not constant.
    """
    graph = Structure(model)
    found: dict[str, Encoding] = {}
    for node in graph.nodes:
        if node.op_type in ("MatMulInteger", "QLinearMatMul"):
            raise ExportError(
                f"node {node.name!r} multiplies integers: the graph has no float tensors to describe; "
                "export under a QDQ profile, for example npu-qdq-int8"
            )
        if node.op_type == "QuantizeLinear":
            for name in _before(graph, node.input[0]):
                found[name] = Encoding(grid=_grid(graph, node), constant=False)
        elif node.op_type == "DequantizeLinear":
            constant = graph.constant(node.input[0]) is not None
            given = not constant and _before(graph, node.input[0])[-1] in graph.inputs
            after = _after(graph, node.output[0])
            if constant or given or graph.outputs.intersection(after):
                found |= dict.fromkeys(after, Encoding(grid=_grid(graph, node), constant=constant))
    return found


def _before(graph: Structure, name: str) -> list[str]:
    """Return a tensor and those that were reshaped into it: step graphs fold batch and heads."""
    names = [name]
    while graph.operator(names[-1]) == "Reshape":
        names.append(graph.writers[names[-1]].input[0])
    return names


def _after(graph: Structure, name: str) -> list[str]:
    """Return a tensor and what it was reshaped into."""
    names = [name]
    for tensor in names:
        # The list grows while it is read.
        names += [reader.output[0] for reader in graph.readers[tensor] if reader.op_type == "Reshape"]
    return names


def _grid(graph: Structure, node: onnx.NodeProto) -> Grid:
    grid = graph.grid(node)
    if grid is None:
        raise ExportError(f"node {node.name!r} has no constant scale and zero point; export it again")
    return grid


def _aimet_2(found: Mapping[str, Encoding]) -> dict[str, Any]:
    entries = []
    for name, encoding in found.items():
        grid = encoding.grid
        zero = {"y_zero_point": grid.zero_point} if grid.zero_point else {}
        entries.append({"name": name, "output_dtype": grid.element, "y_scale": grid.scale, **zero})
    return {"version": "2.0.0", "encodings": entries}


def _aimet_1(found: Mapping[str, Encoding]) -> dict[str, Any]:
    entries: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for name, encoding in found.items():
        entry = {
            "name": name,
            "dtype": "INT",
            "bw": encoding.bits,
            "is_sym": encoding.grid.element.startswith("int"),
            "enc_type": "PER_TENSOR",
            "scale": [encoding.grid.scale],
            "offset": [encoding.offset],
        }
        entries[encoding.constant].append(entry)
    return {
        "version": "1.0.0",
        "activation_encodings": entries[False],
        "param_encodings": entries[True],
        "producer": {"package": "qinvert", "version": __version__},
        "quantizer_args": _quantizer_args(found),
    }


def _quantizer_args(found: Mapping[str, Encoding]) -> dict[str, Any]:
    bits = {
        constant: max((e.bits for e in found.values() if e.constant == constant), default=8)
        for constant in (False, True)
    }
    return {
        "activation_bitwidth": bits[False],
        "param_bitwidth": bits[True],
        "dtype": "int",
        "is_symmetric": True,
        "per_channel_quantization": False,
        "quant_scheme": "min_max",
    }


def _ort(found: Mapping[str, Encoding]) -> dict[str, Any]:
    # A single type belongs into the quantizer's activation_type; its reader does not take types from JSON.
    mixed = len({encoding.grid.element for encoding in found.values()}) > 1
    return {name: [_override(encoding.grid, mixed)] for name, encoding in found.items()}


def _override(grid: Grid, mixed: bool) -> dict[str, Any]:
    # Names of onnxruntime.quantization.QuantType, for QuantType.from_string.
    kind = {"quant_type": f"Q{grid.element.replace('uint', 'UInt').replace('int', 'Int')}"} if mixed else {}
    return {**kind, "scale": grid.scale, "zero_point": grid.zero_point}


#: Every style by its name.
STYLES: Final[dict[str, Writer]] = {"aimet-2.0.0": _aimet_2, "aimet-1.0.0": _aimet_1, "ort": _ort}
