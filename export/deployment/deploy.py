"""`qinvert.deploy`: from a model to a folder with its prefill graph and its decode graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from qinvert.calibration.calibrate import calibrate
from qinvert.calibration.chunk_steps.options import Scope
from qinvert.calibration.model_identity import check_identity
from qinvert.calibration.patching import by_layer, vocabulary_size
from qinvert.checks import check_integer
from qinvert.errors import ExportError, InputError, PlanError
from qinvert.export.deployment.graphs import operators, weight_bytes, window_graph
from qinvert.export.deployment.manifest import DECODE, MANIFEST, PLAN, PREFILL, Manifest
from qinvert.export.deployment.states import State, StateKind
from qinvert.export.deployment.step_calls import LayerStep, RecordedSteps, layer_steps
from qinvert.export.deployment.window import Window, windowed
from qinvert.export.encodings import encodings, to_bytes
from qinvert.export.exporting import hardware_for, profile_for, serialize
from qinvert.export.graph import MAX_BYTES
from qinvert.export.whole_models.export_model import check_float32, chunk_of
from qinvert.export.whole_models.tracing import require_onnx_ir
from qinvert.files import check_replaceable, new_folder
from qinvert.hardware import Hardware, find_hardware
from qinvert.plan.plan import Plan
from qinvert.profiles import Profile

if TYPE_CHECKING:
    import onnx_ir

#: Tokens that the caches of attention layers hold, if the caller does not say.
CACHE: Final = 1024
#: Largest cache and window.
MAX_CACHE: Final = 2**20
MAX_CHUNKS: Final = 64
#: Styles of encodings, by the ends of their files' names.
STYLES: Final = {"aimet": "aimet-2.0.0", "onnxruntime": "ort"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployOptions:
    """Sizes of the graphs.

    Raises
    ------
    ExportError
        At construction, for a size that is not legal.
    """

    #: Chunks of a call of the prefill graph.
    chunks: int = 1
    #: Tokens that the caches of attention layers hold.
    cache: int = CACHE

    def __post_init__(self) -> None:
        check_integer("chunks", self.chunks, 1, MAX_CHUNKS, ExportError, "; pass for example 2")
        check_integer("cache", self.cache, 1, MAX_CACHE, ExportError, f"; pass for example {CACHE}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One of the two graphs."""

    file: str
    model: onnx_ir.Model
    states: tuple[State, ...]
    tokens: int


def deploy(
    model: torch.nn.Module,
    plan_or_data: Any,
    path: str | PathLike[str],
    *,
    hardware: str | None = None,
    chunks: int = 1,
    cache: int = CACHE,
    profile: str | None = None,
    force: bool = False,
    **calibration: Any,
) -> Manifest:
    """Write a model as two static graphs that hand all their states on.

    ``prefill.onnx`` maps ``input_ids [1, T]``, ``valid [1, T]`` (1 for the tokens that
    count, which come first) and all states to ``logits [1, T, V]`` and all states, with
    ``T = chunks C``.  ``decode.onnx`` does so for one token, on the same grids.  Delta-rule
    layers are the integers of their chunk steps, everything else is float32.  An output
    ``NAME_out`` is the input ``NAME`` of the next call of either graph; before the first
    token all states are zero.

    No tensor has more than four axes; there is no loop, selection, scatter or cumulative sum.

    Parameters
    ----------
    model : torch.nn.Module
        A float32 Hugging Face model with delta-rule layers.
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
        If the model has what the graphs must not have, such as sparse attention that sorts tokens,
        or the profile cannot express the plan.
    """
    options = DeployOptions(chunks=chunks, cache=cache)
    require_onnx_ir()
    if isinstance(model, torch.nn.Module):
        check_float32(model)
    check_replaceable(path, MANIFEST)
    plan = _plan(model, plan_or_data, hardware, calibration)
    by_layer(model, plan)
    check_identity(plan, model, force)
    chosen = profile_for(plan, profile)
    chip = _hardware(plan, chosen, hardware)
    graphs = build_graphs(model, plan, chosen, options, chip)
    manifest = _manifest(model, plan, chosen, options, graphs)
    with new_folder(path, MANIFEST) as folder:
        for graph in graphs:
            _write(graph, folder)
        plan.save(folder / PLAN)
        (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


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
    return [
        _graph(PREFILL, model, plan, profile, options, whole, window),
        _graph(DECODE, model, plan, profile, options, single, 1),
    ]


def _graph(
    file: str,
    model: torch.nn.Module,
    plan: Plan,
    profile: Profile,
    options: DeployOptions,
    steps: Mapping[str, LayerStep],
    tokens: int,
) -> Graph:
    window = Window(model, steps, RecordedSteps(plan), options.cache)
    with windowed(window, positions(options, chunk_of(plan))):
        window.probe(tokens)
        graph = window_graph(window, plan, profile, tokens, masked=file == PREFILL)
    return Graph(file=file, model=graph, states=window.states, tokens=tokens)


def positions(options: DeployOptions, chunk: int) -> int:
    """How many positions a deployment knows: those in the cache, and those of a window behind it."""
    return options.cache + options.chunks * chunk


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


def _manifest(
    model: Any, plan: Plan, profile: Profile, options: DeployOptions, graphs: list[Graph]
) -> Manifest:
    prefill, decode = graphs
    if prefill.states != decode.states:
        raise ExportError(
            "prefill and decode have different states, so that neither could go on from the other"
        )
    size = vocabulary_size(model)
    attends = any(state.kind is StateKind.KEYS for state in prefill.states)
    return Manifest(
        chunk=chunk_of(plan),
        chunks=options.chunks,
        cache=options.cache if attends else 0,
        vocabulary=1 if size is None else size,
        ends=_ends(model),
        states=prefill.states,
        weights="none",
        facts={
            "profile": profile.name,
            "hardware": plan.provenance.get("hardware"),
            "plan_sha256": plan.sha256,
            "source": plan.provenance.get("source"),
            "layers": {name: _layer_facts(plan, name) for name in plan.layers},
            "graphs": {graph.file: _graph_facts(graph) for graph in graphs},
        },
    )


def _layer_facts(plan: Plan, name: str) -> dict[str, Any]:
    layer = plan.layer(name)
    grid = layer.tensors["state"]
    return {
        "formats": layer.formats,
        "program": layer.program.title,
        "state_scale": grid.scale,
        "state_format": grid.format.name,
    }


def _graph_facts(graph: Graph) -> dict[str, Any]:
    counts = operators(graph.model)
    return {
        "tokens": graph.tokens,
        "inputs": [_described(value) for value in graph.model.graph.inputs],
        "outputs": [_described(value) for value in graph.model.graph.outputs],
        "nodes": sum(counts.values()),
        "operators": counts,
        "weights": "float32",
        "linear_attention": "integers by the plan",
        "elsewhere": "float32",
    }


def _described(value: Any) -> dict[str, Any]:
    return {
        "name": value.name,
        "shape": [int(size) for size in value.shape],
        "type": value.dtype.name.lower(),
    }


def _ends(model: Any) -> tuple[int, ...]:
    config = getattr(model, "generation_config", None) or getattr(model, "config", None)
    end = getattr(config, "eos_token_id", None)
    if end is None:
        return ()
    return tuple(end) if isinstance(end, (list, tuple)) else (int(end),)
