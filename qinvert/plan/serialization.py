"""Plans as JSON files.

Scales are float32 numbers, written as decimal float64 numbers, so that reading
returns the same bits.  Layers that share a program refer to one copy of it.  Nothing in a file
is executed; everything is checked by the same constructors that calibration
uses.  A file has the oldest schema that can hold it, see
docs/plan-schema.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from qinvert.errors import PlanError, ProgramError
from qinvert.formats import find_format
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.plan.value_channels import ValueChannels
from qinvert.program.program import Program
from qinvert.program.serialization import oldest_schema, program_from_json, program_to_json
from qinvert.strict_json import Json, parse, require
from qinvert.version import __version__

#: Newest version of the file layout; readers take this one and all older ones.
SCHEMA_VERSION: Final = 3


class PlannedLayer(Protocol):
    """What a file stores of one layer."""

    @property
    def program(self) -> Program: ...
    @property
    def tensors(self) -> Mapping[str, Quantization]: ...
    @property
    def requantize(self) -> Requantize: ...
    @property
    def ranges(self) -> Mapping[str, float]: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...
    @property
    def channels(self) -> ValueChannels | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDocument:
    """The content of a file, each layer as the arguments of its plan."""

    layers: Mapping[str, Json]
    target: str
    provenance: Json


def to_bytes(layers: Mapping[str, PlannedLayer], target: str, provenance: Mapping[str, Any]) -> bytes:
    """Return the content of a plan file; equal plans give equal bytes.

    Raises
    ------
    PlanError
        If the provenance holds a value that JSON cannot express.
    """
    programs: list[Json] = []
    entries: Json = {}
    for name, layer in layers.items():
        program = program_to_json(layer.program)
        if program not in programs:
            programs.append(program)
        entries[name] = _layer_to_json(layer, programs.index(program))
    document = {
        "schema_version": max(map(_oldest_schema, layers.values())),
        "producer": {"package": "qinvert", "version": __version__},
        "target": target,
        "provenance": dict(provenance),
        "programs": programs,
        "layers": entries,
    }
    try:
        text = json.dumps(document, indent=1, allow_nan=False)
        json.dumps(document, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"the plan's provenance is not JSON ({error}); use texts, numbers, lists") from None
    return (text + "\n").encode()


def from_bytes(content: bytes) -> PlanDocument:
    """Read the content of a plan file.

    Raises
    ------
    PlanError
        If it is not a plan, has a newer schema, or is inconsistent.
    """
    try:
        return _from_json(parse(content))
    except ProgramError as error:
        raise PlanError(f"damaged program: {error}") from None


def _from_json(document: Json) -> PlanDocument:
    version = require(document, "schema_version", int)
    if version > SCHEMA_VERSION:
        raise PlanError(
            f"plan has schema version {version}, but this qinvert {__version__} reads up to "
            f"{SCHEMA_VERSION}; upgrade qinvert"
        )
    if version < 1:
        raise PlanError(f"plan has schema version {version}; versions start at 1")
    programs = [program_from_json(p) for p in require(document, "programs", list)]
    layers: dict[str, Json] = {}
    for name, layer in require(document, "layers", dict).items():
        index = require(layer, "program", int)
        if not 0 <= index < len(programs):
            raise PlanError(f"layer {name!r} names program {index}, but the plan has {len(programs)}")
        layers[name] = _layer_from_json(layer, name, programs[index])
    return PlanDocument(
        layers=layers,
        target=require(document, "target", str),
        provenance=require(document, "provenance", dict),
    )


def _oldest_schema(layer: PlannedLayer) -> int:
    # An older reader would pass over the channels and compute something else.
    return SCHEMA_VERSION if layer.channels else oldest_schema(layer.program)


def _layer_to_json(layer: PlannedLayer, program: int) -> Json:
    return {
        "program": program,
        "requantize": str(layer.requantize),
        "tensors": {name: {"format": q.format.name, "scale": q.scale} for name, q in layer.tensors.items()},
        "ranges": dict(layer.ranges),
        "provenance": dict(layer.provenance),
        **({"channels": _channels_to_json(layer.channels)} if layer.channels else {}),
    }


def _channels_to_json(channels: ValueChannels) -> Json:
    return {"exponents": [list(row) for row in channels.exponents], "rotated": channels.rotated}


def _channels_from_json(obj: Any) -> ValueChannels:
    rows = require(obj, "exponents", list)
    if not all(isinstance(row, list) for row in rows):
        raise PlanError("'exponents' must be a list of lists of integers")
    return ValueChannels(exponents=tuple(map(tuple, rows)), rotated=require(obj, "rotated", bool))


def _layer_from_json(layer: Any, name: str, program: Program) -> Json:
    try:
        ranges = require(layer, "ranges", dict)
        if not all(isinstance(v, (int, float)) for v in ranges.values()):
            raise PlanError("'ranges' must map names to numbers")
        return {
            "program": program,
            "tensors": _tensors_from_json(require(layer, "tensors", dict)),
            "requantize": require(layer, "requantize", str),
            "ranges": ranges,
            "provenance": require(layer, "provenance", dict),
            "channels": _channels_from_json(layer["channels"]) if "channels" in layer else None,
        }
    except PlanError as error:
        raise PlanError(f"layer {name!r}: {error}") from None


def _tensors_from_json(tensors: Mapping[str, Any]) -> dict[str, Quantization]:
    return {
        name: Quantization(
            format=find_format(require(entry, "format", str)), scale=float(require(entry, "scale", float))
        )
        for name, entry in tensors.items()
    }
