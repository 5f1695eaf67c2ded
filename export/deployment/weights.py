"""Weights of projections, MLPs and the head in 8 or 4 bits, by onnxruntime's own quantizer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qinvert.errors import ExportError, MissingDependencyError, reason
from qinvert.export.deployment.deployment import Array, windows
from qinvert.export.deployment.graphs import Graph, check_operators, tidy
from qinvert.export.deployment.manifest import DECODE, PREFILL
from qinvert.export.deployment.options import BLOCK, DeployOptions, Weights
from qinvert.export.deployment.products import products, same_products
from qinvert.export.deployment.states import SUFFIX, State
from qinvert.export.runtimes.onnxruntime_cpu import open_session
from qinvert.temporaries import scratch_folder

if TYPE_CHECKING:
    from pathlib import Path

    import onnx
    import onnx_ir

#: Sequences that activations are calibrated on, at most.
SEQUENCES: Final = 16
#: Note of a model that onnxruntime's quantizer takes as it is, without inferring shapes once more.
INFERRED: Final = ("onnx.infer", "onnxruntime.quant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Smallest and largest value of a tensor, zero included."""

    low: float
    high: float

    def joined(self, values: Array) -> Range:
        """Cover further values, too."""
        return Range(low=min(self.low, float(values.min())), high=max(self.high, float(values.max())))


def described(options: DeployOptions) -> dict[str, str]:
    """Say which types the products with weights have, for a reader of the manifest."""
    kinds = {
        Weights.NONE: "float32",
        Weights.W8: "int8, symmetric, a scale for each output channel",
        Weights.W4: f"int4, symmetric, a scale for each {BLOCK} weights of an output channel",
    }
    activations = "float32"
    if options.weights != Weights.NONE:
        activations = f"int{options.activation_bits}, symmetric, a scale for each tensor"
    return {"weights": kinds[Weights(options.weights)], "activations": activations}


def rows_of(batches: Iterable[Mapping[str, Any]]) -> Iterator[Array]:
    """Yield the first `SEQUENCES` rows of token ids, without padding."""
    rows = (row for batch in batches for row in _rows(batch))
    return islice(rows, SEQUENCES)


def _rows(batch: Mapping[str, Any]) -> Iterator[Array]:
    ids = batch["input_ids"].cpu().numpy()
    mask = batch.get("attention_mask")
    kept = np.ones(ids.shape, dtype=bool) if mask is None else mask.cpu().numpy().astype(bool)
    return (row[real] for row, real in zip(ids, kept, strict=True) if real.any())


def with_weights(
    graphs: Sequence[Graph], rows: Iterable[Array], options: DeployOptions, chunk: int
) -> list[Graph]:
    """Return prefill and decode with integer weights, on the same grids of activations.

    Parameters
    ----------
    graphs : sequence of Graph
        Prefill and decode.
    rows : iterable of arrays ``[n]``
        Token ids that activations are calibrated on, by the prefill graph.
    options : DeployOptions
    chunk : int
        Tokens of a chunk.

    Raises
    ------
    ExportError
        If the graphs have different products, or onnxruntime cannot quantize them.
    """
    prefill, decode = graphs
    pairs = same_products(prefill.model, decode.model)
    names = list(dict.fromkeys(pairs.values()))
    sizes = options.chunks * chunk, options.cache
    with scratch_folder() as folder:
        written = _watched(prefill.model, names, folder)
        found = activation_ranges(written, names, prefill.states, sizes, rows)
    ranges = {PREFILL: found, DECODE: {name: found[other] for name, other in pairs.items()}}
    return [replace(graph, model=quantized(graph.model, ranges[graph.file], options)) for graph in graphs]


def _watched(model: onnx_ir.Model, names: Sequence[str], folder: Path) -> Path:
    """Write a graph that also returns the named tensors."""
    import onnx_ir

    outputs = model.graph.outputs
    before = len(outputs)
    known = {value.name for value in outputs}
    values = {value.name: value for node in model.graph for value in node.outputs}
    outputs.extend(values[name] for name in names if name not in known)
    try:
        onnx_ir.save(model, folder / PREFILL, external_data=f"{PREFILL}.data")
    finally:
        # One by one: a slice would leave them marked as outputs.
        while len(outputs) > before:
            outputs.pop()
    return folder / PREFILL


def activation_ranges(
    path: Path, names: Sequence[str], states: Sequence[State], sizes: tuple[int, int], rows: Iterable[Array]
) -> dict[str, Range]:
    """Run rows of tokens through a prefill graph in windows, and return the ranges of tensors.

    Parameters
    ----------
    path : Path
        Graph with these tensors among its outputs.
    names : sequence of str
    states : sequence of State
    sizes : (int, int)
        Tokens of a window, and of the caches; what no longer fits these is left out.
    rows : iterable of arrays ``[n]``
        Token ids.
    """
    session = open_session(str(path))
    outputs = list(dict.fromkeys([*names, *(state.name + SUFFIX for state in states)]))
    found = {name: Range(low=0.0, high=0.0) for name in names}
    window, cache = sizes
    for ids in rows:
        kept = ids[: cache // window * window + window]
        given = {state.name: state.zeros().numpy() for state in states}
        for _, feed in windows(kept, window):
            results = dict(zip(outputs, session.run(outputs, {**feed, **given}), strict=True))
            given = {name: results[name + SUFFIX] for name in given}
            found = {name: known.joined(results[name]) for name, known in found.items()}
    return found


def quantized(model: onnx_ir.Model, ranges: Mapping[str, Range], options: DeployOptions) -> onnx_ir.Model:
    """Return a graph whose `products` have integer weights and activations, as QDQ.

    ``y = DQ(Q(DQ(Q(x)) @ DQ(W)))``: every operator is one of ONNX, and every zero point is 0.

    Parameters
    ----------
    model : onnx_ir.Model
        Not changed.
    ranges : mapping
        Of every tensor of `tensors`.
    options : DeployOptions
        With weights w8 or w4.

    Raises
    ------
    ExportError
        If onnxruntime cannot quantize it, or does not know blocks of weights.
    MissingDependencyError
        If onnxruntime is not installed.
    """
    import onnx_ir

    names = [str(node.name) for node in products(model)]
    proto = onnx_ir.serde.serialize_model(model)
    if not names:
        return onnx_ir.serde.deserialize_model(proto)
    note = proto.metadata_props.add()
    note.key, note.value = INFERRED
    found = _by_onnxruntime(proto, names, ranges, options)
    kept = [entry for entry in found.metadata_props if entry.key != INFERRED[0]]
    del found.metadata_props[:]
    found.metadata_props.extend(kept)
    found.producer_name, found.producer_version = proto.producer_name, proto.producer_version
    _check_blocks(found, options)
    result = onnx_ir.serde.deserialize_model(found)
    _restore_floats(result, {*names})
    tidy(result)
    check_operators(result)
    return result


def _restore_floats(model: onnx_ir.Model, names: set[str]) -> None:
    """Have other nodes than the named products read what they read before they were quantized."""
    given = {node.inputs[0] for node in model.graph if node.name in names}
    for value in given:
        node = None if value is None else value.producer()
        source = None if node is None else _before_grid(node)
        if value is None or source is None or _is_written_by(source, names):
            # The result of a product is on its grid for all who read it.
            continue
        for reader, index in list(value.uses()):
            if reader.name not in names:
                reader.replace_input_with(index, source)


def _is_written_by(value: onnx_ir.Value, names: set[str]) -> bool:
    writer = value.producer()
    return writer is not None and writer.name in names


def _before_grid(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """The float tensor that a pair of QuantizeLinear and DequantizeLinear rounds; None for weights."""
    value = node.inputs[0]
    writer = None if value is None else value.producer()
    return None if writer is None or writer.op_type != "QuantizeLinear" else writer.inputs[0]


def _by_onnxruntime(
    proto: onnx.ModelProto,
    names: list[str],
    ranges: Mapping[str, Range],
    options: DeployOptions,
) -> onnx.ModelProto:
    try:
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    except ImportError:
        raise MissingDependencyError(
            "quantized weights need onnxruntime, which is not installed; run: pip install onnxruntime"
        ) from None
    wide = options.weights == Weights.W8
    limits = {name: (np.float32(x.low), np.float32(x.high)) for name, x in ranges.items()}
    extra: dict[str, Any] = {"ActivationSymmetric": True, "WeightSymmetric": True}
    if not wide:
        extra["BlockSize"] = BLOCK
    with _without_notices():
        try:
            quantizer = QDQQuantizer(
                proto,
                per_channel=wide,
                reduce_range=False,
                weight_qType=QuantType.QInt8 if wide else QuantType.QInt4,
                activation_qType=QuantType.QInt8 if options.activation_bits == 8 else QuantType.QInt16,
                tensors_range=TensorsData(CalibrationMethod.MinMax, limits),
                nodes_to_quantize=names,
                nodes_to_exclude=[],
                op_types_to_quantize=["MatMul"],
                extra_options=extra,
            )
            model: onnx.ModelProto = quantizer.quantize_model()
        except Exception as error:  # onnxruntime raises unrelated types here
            raise ExportError(
                f"onnxruntime cannot quantize the weights: {reason(error)}; deploy with --weights none"
            ) from error
    return model


@contextmanager
def _without_notices() -> Iterator[None]:
    """Leave out what onnxruntime's quantizer says to the root logger of graphs that it was not made for."""
    logger, before = logging.getLogger(), logging.getLogger().level
    logger.setLevel(max(before, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(before)


def _check_blocks(model: onnx.ModelProto, options: DeployOptions) -> None:
    blocked = any(a.name == "block_size" for node in model.graph.node for a in node.attribute)
    if options.weights == Weights.W4 and not blocked:
        raise ExportError(
            "this version of onnxruntime does not quantize weights in blocks; upgrade onnxruntime, or deploy "
            "with --weights w8"
        )
