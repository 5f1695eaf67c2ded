"""`qinvert.deploy`: from a model to a folder with its prefill graph and its decode graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Final

import torch

from qinvert.calibration.calibrate import calibrate
from qinvert.calibration.chunk_steps.options import Scope
from qinvert.calibration.data.token_batches import token_batches
from qinvert.calibration.data.token_data import with_options
from qinvert.calibration.model_identity import check_identity
from qinvert.calibration.patching import by_layer
from qinvert.errors import InputError, PlanError
from qinvert.export.deployment.deployment import Array
from qinvert.export.deployment.facts import manifest_of
from qinvert.export.deployment.graphs import Graph, weight_bytes, window_graph
from qinvert.export.deployment.manifest import DECODE, MANIFEST, PLAN, PREFILL, Manifest
from qinvert.export.deployment.options import CACHE, DeployOptions, Weights
from qinvert.export.deployment.products import products
from qinvert.export.deployment.step_calls import LayerStep, RecordedSteps, layer_steps
from qinvert.export.deployment.weights import rows_of, with_weights
from qinvert.export.deployment.window import Window, windowed
from qinvert.export.encodings import encodings, to_bytes
from qinvert.export.exporting import hardware_for, profile_for, serialize
from qinvert.export.graph import MAX_BYTES
from qinvert.export.whole_models.export_model import check_float32, chunk_of
from qinvert.export.whole_models.tracing import require_onnx_ir
from qinvert.files import check_replaceable, new_folder
from qinvert.hardware import Compiler, Hardware, find_hardware
from qinvert.plan.plan import Plan
from qinvert.pretrained import opened
from qinvert.profiles import Profile

#: Styles of encodings, by the ends of their files' names.
STYLES: Final = {"aimet": "aimet-2.0.0", "onnxruntime": "ort"}


def deploy(
    model: torch.nn.Module | str | PathLike[str],
    plan_or_data: Any,
    path: str | PathLike[str],
    *,
    hardware: str | None = None,
    chunks: int = 1,
    cache: int = CACHE,
    profile: str | None = None,
    weights: str = Weights.NONE,
    activation_bits: int = 16,
    data: Any = None,
    force: bool = False,
    **calibration: Any,
) -> Manifest:
    """Write a model as two static graphs that hand all their states on.

    ``prefill.onnx`` maps ``input_ids [1, T]``, ``valid [1, T]`` (1 for the tokens that
    count, which come first) and all states to ``logits [1, T, V]`` and all states, with
    ``T = chunks C``.  ``decode.onnx`` does so for one token, on the same grids.  Delta-rule
    layers are the integers of their chunk steps, everything else is float32, but for products
    with weights where these are quantized.  An output ``NAME_out`` is the input ``NAME`` of the
    next call of either graph; before the first token all states are zero.

    No tensor has more than four axes; there is no loop, selection, scatter or cumulative sum.

    Parameters
    ----------
    model : torch.nn.Module or path
        A float32 Hugging Face model with delta-rule layers, or its folder.
    plan_or_data : Plan or data
        A plan of this model with ``scope="chunk"``, or data as `qinvert.calibrate` takes it.
    path : path
        Folder to write; it takes its place as a whole, in the end.  It also has the plan, the
        encodings, and ``manifest.json``, which says everything that a host needs.
    hardware : str, optional
        Chip to plan for, see `qinvert.hardware`; the plan's if left out.
    chunks : int
        Chunks of a call of the prefill graph.
    cache : int
        Tokens that the caches of attention layers hold, padding of partly filled windows included.
    profile : str, optional
        Export profile of the steps; the plan's target if left out.
    weights : {"none", "w8", "w4"}
        Weights of projections, MLPs and the head: float32; int8 with a scale for each output
        channel; or int4 with a scale for each 32 weights of a channel.  onnxruntime's quantizer
        writes them, as QDQ with standard operators.  Norms, convolutions, products with experts and
        what gates, routers and indexers come from stay in float32, and planned layers are what they were.
    activation_bits : {16, 8}
        Bits of the inputs and outputs of these products, one symmetric grid for each tensor.
    data : optional
        Data that these grids are calibrated on, where ``plan_or_data`` is a plan; as there.
    force : bool
        Go on with another model than the one that the plan was made for.
    **calibration
        Passed to `qinvert.calibrate`, where data are given.

    Returns
    -------
    Manifest

    Raises
    ------
    InputError
        If the model has no delta-rule layer or other weights than float32, or the folder is not free.
    PlanError
        If the plan is not one of chunk steps of this model.
    ExportError
        If the model has what the graphs must not have, such as embeddings that hashes look up,
        or the profile cannot express the plan.
    """
    options = DeployOptions(chunks=chunks, cache=cache, weights=weights, activation_bits=activation_bits)
    require_onnx_ir()
    check_replaceable(path, MANIFEST)
    loaded = opened(model)
    if isinstance(loaded, torch.nn.Module):
        check_float32(loaded)
    given, rows = _with_rows(loaded, plan_or_data, data, options, calibration)
    plan = _plan(loaded, given, hardware, calibration)
    by_layer(loaded, plan)
    check_identity(plan, loaded, force)
    chosen = profile_for(plan, profile)
    chip = _hardware(plan, chosen, hardware)
    graphs = build_graphs(loaded, plan, chosen, options, chip)
    if options.weights != Weights.NONE:
        graphs = with_weights(graphs, rows, options, chunk_of(plan))
    manifest = manifest_of(loaded, plan, chosen, options, graphs)
    with new_folder(path, MANIFEST) as folder:
        for graph in graphs:
            _write(graph, folder)
        plan.save(folder / PLAN)
        (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


def _with_rows(
    model: torch.nn.Module,
    given: Any,
    data: Any,
    options: DeployOptions,
    calibration: dict[str, Any],
) -> tuple[Any, Iterable[Array]]:
    """Return the plan or data, and rows of tokens to calibrate activations on."""
    planned = isinstance(given, Plan)
    if data is not None and (not planned or options.weights == Weights.NONE):
        raise InputError(
            "data=... calibrates the activations of quantized weights under a finished plan; "
            "leave it out, or pass a plan and weights='w8'"
        )
    if options.weights == Weights.NONE:
        return given, ()
    if planned and data is None:
        raise InputError(
            f"weights={str(options.weights)!r} calibrates activations, and a plan has no data; pass data=..."
        )
    if not planned:
        # Once: a reader ends when it has been read.
        count, length = (calibration.pop(name, None) for name in ("num_samples", "seq_len"))
        read = with_options(given, count, length, calibration.get("seed", 0))
        given = data = list(token_batches(read, model))
    return given, rows_of(token_batches(data, model))


def _plan(model: torch.nn.Module, given: Any, hardware: str | None, options: Mapping[str, Any]) -> Plan:
    if not isinstance(given, Plan):
        named: dict[str, Any] = {} if hardware is None else {"hardware": hardware}
        return calibrate(model, given, **{"scope": Scope.CHUNK, **named, **options})
    if options:
        raise InputError(f"{', '.join(options)} are for calibration, but a plan was passed; leave them out")
    return given


def _hardware(plan: Plan, profile: Profile, given: str | None) -> Hardware | None:
    known = plan.provenance.get("hardware")
    if given is not None and known is not None and given != known:
        raise PlanError(
            f"the plan was made for {known}, not for {given}; leave hardware out, or calibrate again"
        )
    return hardware_for(plan, profile) if given is None else find_hardware(given)


def build_graphs(
    model: torch.nn.Module,
    plan: Plan,
    profile: Profile,
    options: DeployOptions,
    hardware: Hardware | None = None,
) -> list[Graph]:
    """Return the prefill graph and the decode graph.

    Raises
    ------
    ExportError, PlanError
        See `deploy`.
    """
    window = options.chunks * chunk_of(plan)
    whole, single = (layer_steps(plan, chunks, hardware) for chunks in (options.chunks, None))
    compiler = None if hardware is None else hardware.compiler
    return [
        _graph(PREFILL, model, plan, profile, options, whole, window, compiler),
        _graph(DECODE, model, plan, profile, options, single, 1, compiler),
    ]


def _graph(
    file: str,
    model: torch.nn.Module,
    plan: Plan,
    profile: Profile,
    options: DeployOptions,
    steps: Mapping[str, LayerStep],
    tokens: int,
    compiler: Compiler | None,
) -> Graph:
    window = Window(model, steps, RecordedSteps(plan), options.cache)
    with windowed(window, options.positions(chunk_of(plan))):
        window.probe(tokens)
        facts: dict[str, Any] = {"opset": options.opset, "compiler": compiler}
        graph = window_graph(window, plan, profile, tokens, masked=file == PREFILL, **facts)
    number = len(products(graph))
    return Graph(file=file, model=graph, states=window.states, tokens=tokens, products=number)


def _write(graph: Graph, folder: Path) -> None:
    """Write a graph and its encodings, with weights in a second file where protobuf's limit demands it."""
    import onnx_ir
    from onnx_ir.serde import serialize_model

    if weight_bytes(graph.model) > MAX_BYTES:
        onnx_ir.save(graph.model, folder / graph.file, external_data=f"{graph.file}.data")
        return
    proto = serialize_model(graph.model)
    (folder / graph.file).write_bytes(serialize(proto))
    for name, style in STYLES.items():
        stem = graph.file.removesuffix(".onnx")
        (folder / f"{stem}.{name}.json").write_bytes(to_bytes(encodings(proto, style)))
