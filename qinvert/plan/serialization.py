"""Plans as JSON files.

Scales are written as decimal float64 of a float32, which round-trips bit for
bit.  Layers that share a program refer to one copy of it.  Nothing in a file
is executed; everything is checked by the same constructors that calibration
uses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from typing import Any, Final, TypeVar

from qinvert.errors import PlanError, ProgramError, QInvertError
from qinvert.files import read_bytes, write_atomically
from qinvert.formats import find_format
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantization import Quantization
from qinvert.program.serialization import program_from_json, program_to_json
from qinvert.strict_json import Json, parse, require
from qinvert.version import __version__

#: Version of the file layout; readers take this one and all older ones.
SCHEMA_VERSION: Final = 1


T = TypeVar("T")


def save(plan: Plan, path: str | PathLike[str]) -> None:
    """Write ``plan`` to ``path``, atomically."""
    write_atomically(path, to_bytes(plan))


def load(path: str | PathLike[str]) -> Plan:
    """Read a plan.

    Raises
    ------
    PlanError
        With the path and the reason.
    """
    try:
        return from_bytes(read_bytes(path))
    except QInvertError as error:
        raise PlanError(f"{path}: {error}") from None


def sha256(plan: Plan) -> str:
    """Hash of the plan's file content; identifies it in exported graphs."""
    return hashlib.sha256(to_bytes(plan)).hexdigest()


def to_bytes(plan: Plan) -> bytes:
    """Return the file content; equal plans give equal bytes."""
    programs: list[Json] = []
    layers: Json = {}
    for name, layer in plan.layers.items():
        program = program_to_json(layer.program)
        if program not in programs:
            programs.append(program)
        layers[name] = _layer_to_json(layer, programs.index(program))
    document = {
        "schema_version": SCHEMA_VERSION,
        "producer": {"package": "qinvert", "version": __version__},
        "target": plan.target,
        "provenance": dict(plan.provenance),
        "programs": programs,
        "layers": layers,
    }
    try:
        text = json.dumps(document, indent=1, allow_nan=False)
        json.dumps(document, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"the plan's provenance is no JSON ({error}); use texts, numbers, lists") from None
    return (text + "\n").encode()


def from_bytes(content: bytes) -> Plan:
    """Read a plan from file content.

    Raises
    ------
    PlanError
        If it is no plan, of a newer schema, or inconsistent.
    """
    try:
        return _from_json(parse(content))
    except ProgramError as error:
        raise PlanError(f"damaged program: {error}") from None


def _from_json(document: Json) -> Plan:
    version = require(document, "schema_version", int)
    if version > SCHEMA_VERSION:
        raise PlanError(
            f"plan has schema version {version}, this qinvert {__version__} reads up to {SCHEMA_VERSION}; "
            "upgrade qinvert"
        )
    if version < 1:
        raise PlanError(f"plan has schema version {version}; versions start at 1")
    programs = [program_from_json(p) for p in require(document, "programs", list)]
    layers: dict[str, LayerPlan] = {}
    for name, layer in require(document, "layers", dict).items():
        index = require(layer, "program", int)
        if not 0 <= index < len(programs):
            raise PlanError(f"layer {name!r} names program {index}, the plan has {len(programs)}")
        layers[name] = _layer_from_json(layer, name, programs[index])
    return Plan(
        layers=layers,
        target=require(document, "target", str),
        provenance=require(document, "provenance", dict),
    )


def _layer_to_json(layer: LayerPlan, program: int) -> Json:
    return {
        "program": program,
        "requantize": str(layer.requantize),
        "tensors": {name: {"format": q.format.name, "scale": q.scale} for name, q in layer.tensors.items()},
        "ranges": dict(layer.ranges),
        "provenance": dict(layer.provenance),
    }


def _layer_from_json(layer: Any, name: str, program: Any) -> LayerPlan:
    try:
        ranges = require(layer, "ranges", dict)
        if not all(isinstance(v, (int, float)) for v in ranges.values()):
            raise PlanError("'ranges' must map names to numbers")
        return LayerPlan(
            program=program,
            tensors=_tensors_from_json(require(layer, "tensors", dict)),
            requantize=require(layer, "requantize", str),  # type: ignore[arg-type] # LayerPlan converts
            ranges=ranges,
            provenance=require(layer, "provenance", dict),
        )
    except PlanError as error:
        raise PlanError(f"layer {name!r}: {error}") from None


def _tensors_from_json(tensors: Mapping[str, Any]) -> dict[str, Quantization]:
    return {
        name: Quantization(
            format=find_format(require(entry, "format", str)), scale=float(require(entry, "scale", float))
        )
        for name, entry in tensors.items()
    }
