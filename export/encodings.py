"""The scales of a QDQ graph as the JSON files that other toolchains read.

Tools that drop QuantizeLinear and DequantizeLinear from a graph want the
scales in a file, by the names of the float tensors that remain.  These are the
tensors that QuantizeLinear reads, and those that DequantizeLinear makes of a
constant or returns from the graph.  A constant may have a scale for each channel,
or for each block of channels.  Where a graph splits a 16-bit operand into
two planes, the planes have their own entries, but the split itself is lost
with its nodes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import onnx

from qinvert.errors import ExportError, lookup
from qinvert.export.rules.float_states import carried_floats
from qinvert.export.rules.graph_index import Grid, Structure, attribute
from qinvert.formats import FLOAT32
from qinvert.version import __version__

#: What stands for the grid of a tensor that nothing rounds.
FLOAT: Final = Grid(scale=1.0, zero_point=0, element=FLOAT32.element)
#: What a style makes of the quantized tensors.
Writer = Callable[[Mapping[str, "Encoding"]], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How one float tensor is quantized."""

    #: Scale, zero point and container; of several scales the largest one.
    grid: Grid
    #: Whether the tensor is a constant.
    constant: bool
    #: Scales of a constant that has several; None for one of the whole tensor.
    channels: Channels | None = None

    @property
    def is_float(self) -> bool:
        """Whether nothing is rounded: a state that goes from chunk to chunk in float32."""
        return self.grid == FLOAT

    @property
    def bits(self) -> int:
        """Bits of the container."""
        if self.is_float:
            return FLOAT32.container_bits
        return int(self.grid.element.removeprefix("u").removeprefix("int"))

    @property
    def offset(self) -> int:
        """Minus the zero point on the unsigned grid of as many bits: -128 for int8."""
        lowest = 0 if self.grid.element.startswith("u") else -(2 ** (self.bits - 1))
        return lowest - self.grid.zero_point


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """Scales along an axis of a constant, as DequantizeLinear takes them; all zero points are 0."""

    #: One for each channel, or a row for each block of ``block_size`` channels.
    scales: tuple[Any, ...]
    axis: int
    #: Channels that share a row of scales; 0 where each has its own scale.
    block_size: int


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
                found |= dict.fromkeys(after, _encoding(graph, node, constant=constant))
    carried = carried_floats(graph)
    return found | {
        name: Encoding(grid=FLOAT, constant=False) for name in graph.activations if name in carried
    }


def _encoding(graph: Structure, node: onnx.NodeProto, *, constant: bool) -> Encoding:
    channels = _channels(graph, node) if constant else None
    if channels is None:
        return Encoding(grid=_grid(graph, node), constant=constant)
    largest = float(np.max(channels.scales))
    element = str(graph.element(node.input[0]))
    return Encoding(grid=Grid(scale=largest, zero_point=0, element=element), constant=True, channels=channels)


def _channels(graph: Structure, node: onnx.NodeProto) -> Channels | None:
    """Scales of a constant that has several and whose zero points are all 0; None for any other."""
    scales = graph.constant(node.input[1])
    zeros = graph.constant(node.input[2]) if len(node.input) > 2 else np.zeros(1)
    if scales is None or scales.size < 2 or zeros is None or np.any(zeros.astype(np.int32)):
        return None
    return Channels(
        scales=tuple(scales.tolist()),
        axis=attribute(node, "axis", 1),
        block_size=attribute(node, "block_size", 0),
    )


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
    entries: list[dict[str, Any]] = []
    for name, encoding in found.items():
        grid = encoding.grid
        if encoding.is_float:
            entries.append({"name": name, "output_dtype": grid.element})
            continue
        zero = {"y_zero_point": grid.zero_point} if grid.zero_point else {}
        scale = {"y_scale": grid.scale} if encoding.channels is None else _several(encoding.channels)
        entries.append({"name": name, "output_dtype": grid.element, **scale, **zero})
    return {"version": "2.0.0", "encodings": entries}


def _several(channels: Channels) -> dict[str, Any]:
    """Scales in the terms of DequantizeLinear, which are those of AIMET 2.0.0."""
    blocks = {"block_size": channels.block_size} if channels.block_size else {}
    return {"y_scale": list(channels.scales), "axis": channels.axis, **blocks}


def _aimet_1(found: Mapping[str, Encoding]) -> dict[str, Any]:
    entries: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for name, encoding in _without_blocks(found).items():
        if encoding.is_float:
            real = {"name": name, "dtype": "FLOAT", "bw": encoding.bits, "enc_type": "PER_TENSOR"}
            entries[False].append(real)
            continue
        scales = [encoding.grid.scale] if encoding.channels is None else list(encoding.channels.scales)
        entry = {
            "name": name,
            "dtype": "INT",
            "bw": encoding.bits,
            "is_sym": encoding.grid.element.startswith("int"),
            "enc_type": "PER_TENSOR" if encoding.channels is None else "PER_CHANNEL",
            "scale": scales,
            "offset": [encoding.offset] * len(scales),
        }
        entries[encoding.constant].append(entry)
    return {
        "version": "1.0.0",
        "activation_encodings": entries[False],
        "param_encodings": entries[True],
        "producer": {"package": "qinvert", "version": __version__},
        "quantizer_args": _quantizer_args(found),
    }


def _without_blocks(found: Mapping[str, Encoding]) -> dict[str, Encoding]:
    """Leave out constants with blocks of scales, which only AIMET 2.0.0 can describe."""
    return {
        name: encoding
        for name, encoding in found.items()
        if encoding.channels is None or not encoding.channels.block_size
    }


def _quantizer_args(found: Mapping[str, Encoding]) -> dict[str, Any]:
    bits = {
        constant: max(
            (e.bits for e in found.values() if e.constant == constant and not e.is_float), default=8
        )
        for constant in (False, True)
    }
    return {
        "activation_bitwidth": bits[False],
        "param_bitwidth": bits[True],
        "dtype": "int",
        "is_symmetric": True,
        "per_channel_quantization": any(e.channels is not None for e in found.values()),
        "quant_scheme": "min_max",
    }


def _ort(found: Mapping[str, Encoding]) -> dict[str, Any]:
    # Its quantizer leaves tensors without an entry in float.
    found = {name: encoding for name, encoding in found.items() if not encoding.is_float}
    # A single type belongs into the quantizer's activation_type; its reader does not take types from JSON.
    mixed = len({encoding.grid.element for encoding in found.values()}) > 1
    return {name: _overrides(encoding, mixed) for name, encoding in _without_blocks(found).items()}


def _overrides(encoding: Encoding, mixed: bool) -> list[dict[str, Any]]:
    channels = encoding.channels
    if channels is None:
        return [_override(encoding.grid, mixed)]
    grids = [replace(encoding.grid, scale=float(scale)) for scale in channels.scales]
    return [{**_override(grid, mixed), "axis": channels.axis} for grid in grids]


def _override(grid: Grid, mixed: bool) -> dict[str, Any]:
    # Names of onnxruntime.quantization.QuantType, for QuantType.from_string.
    kind = {"quant_type": f"Q{grid.element.replace('uint', 'UInt').replace('int', 'Int')}"} if mixed else {}
    return {**kind, "scale": grid.scale, "zero_point": grid.zero_point}


#: Every style by its name.
STYLES: Final[dict[str, Writer]] = {"aimet-2.0.0": _aimet_2, "aimet-1.0.0": _aimet_1, "ort": _ort}
