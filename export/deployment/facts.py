"""What a manifest says of a deployment: states, shapes, operators, and what runs in which type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qinvert.calibration.patching import vocabulary_size
from qinvert.errors import ExportError
from qinvert.export.deployment.graphs import Graph, operators
from qinvert.export.deployment.manifest import Manifest
from qinvert.export.deployment.options import DeployOptions
from qinvert.export.deployment.states import StateKind
from qinvert.export.deployment.weights import described
from qinvert.export.whole_models.export_model import chunk_of
from qinvert.plan.plan import Plan
from qinvert.profiles import Profile


def manifest_of(
    model: Any, plan: Plan, profile: Profile, options: DeployOptions, graphs: Sequence[Graph]
) -> Manifest:
    """Return the manifest of two graphs.

    Raises
    ------
    ExportError
        If they do not have the same states.
    """
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
        weights=str(options.weights),
        facts={
            "profile": profile.name,
            "hardware": plan.provenance.get("hardware"),
            "plan_sha256": plan.sha256,
            "source": plan.provenance.get("source"),
            "layers": {name: _layer_facts(plan, name) for name in plan.layers},
            "graphs": {graph.file: _graph_facts(graph, options) for graph in graphs},
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


def _graph_facts(graph: Graph, options: DeployOptions) -> dict[str, Any]:
    counts = operators(graph.model)
    return {
        "tokens": graph.tokens,
        "inputs": [_described(value) for value in graph.model.graph.inputs],
        "outputs": [_described(value) for value in graph.model.graph.outputs],
        "nodes": sum(counts.values()),
        "operators": counts,
        "linear_attention": "integers by the plan",
        "projections": {
            "nodes": graph.products,
            **described(options),
        },
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
