"""What a deployed folder says of itself, for those who drive its graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Final

from qinvert.errors import InputError, PlanError
from qinvert.export.deployment.states import State, StateKind
from qinvert.files import read_bytes
from qinvert.strict_json import parse, require

#: File of the manifest.
MANIFEST: Final = "manifest.json"
#: File of the plan.
PLAN: Final = "plan.json"
#: Files of the graphs.
PREFILL: Final = "prefill.onnx"
DECODE: Final = "decode.onnx"
#: Version of the format of the manifest.
VERSION: Final = 1
#: Largest manifest that is read.
MAX_MANIFEST: Final = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Sizes and states of a deployment.

    Raises
    ------
    InputError
        At construction, for sizes that are not positive.
    """

    #: Tokens of a chunk.
    chunk: int
    #: Chunks of a call of the prefill graph.
    chunks: int
    #: Tokens that the caches of attention layers hold; 0 where the model has none.
    cache: int
    #: Number of tokens that the model knows.
    vocabulary: int
    #: Tokens that end a text.
    ends: tuple[int, ...]
    states: tuple[State, ...]
    #: How weights are stored: none, w8 or w4.
    weights: str
    #: What a reader may want to know: profile, hardware, hash of the plan, the graphs.
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = (self.chunk, self.chunks, self.vocabulary)
        if min(sizes) < 1 or self.cache < 0 or not self.states:
            raise InputError(
                f"the manifest has the sizes {sizes} and {len(self.states)} states; deploy again"
            )

    @property
    def window(self) -> int:
        """Tokens of a call of the prefill graph."""
        return self.chunk * self.chunks

    def to_bytes(self) -> bytes:
        """Return the content of the file; equal manifests give equal bytes."""
        document = {
            "version": VERSION,
            "chunk": self.chunk,
            "chunks": self.chunks,
            "window": self.window,
            "cache": self.cache,
            "vocabulary": self.vocabulary,
            "end_tokens": list(self.ends),
            "weights": self.weights,
            "states": [state.to_json() for state in self.states],
            **self.facts,
        }
        return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()

    @staticmethod
    def load(folder: str | PathLike[str]) -> Manifest:
        """Read the manifest of a folder.

        Raises
        ------
        InputError
            If there is none, or it is damaged or newer.
        """
        path = Path(folder) / MANIFEST
        try:
            return _manifest(parse(read_bytes(path, MAX_MANIFEST)))
        except (PlanError, ValueError) as error:
            raise InputError(f"{path}: {error}; write the folder again by: qinvert deploy") from None


def _manifest(document: dict[str, Any]) -> Manifest:
    version = require(document, "version", int)
    if version != VERSION:
        raise InputError(f"version {version} is not {VERSION}")
    return Manifest(
        chunk=require(document, "chunk", int),
        chunks=require(document, "chunks", int),
        cache=require(document, "cache", int),
        vocabulary=require(document, "vocabulary", int),
        ends=tuple(require({"end": end}, "end", int) for end in require(document, "end_tokens", list)),
        weights=require(document, "weights", str),
        states=tuple(_state(entry) for entry in require(document, "states", list)),
        facts={key: document[key] for key in document if key in FACTS},
    )


#: Keys of `Manifest.facts`.
FACTS: Final = ("profile", "hardware", "plan_sha256", "layers", "graphs", "source")


def _state(entry: Any) -> State:
    layer = entry.get("layer") if isinstance(entry, dict) else None
    shape = [require({"size": size}, "size", int) for size in require(entry, "shape", list)]
    state = State(
        kind=StateKind(require(entry, "kind", str)),
        shape=tuple(shape),
        layer=None if layer is None else require(entry, "layer", int),
        index=require(entry, "index", int),
    )
    if state.name != require(entry, "name", str) or min(shape, default=0) < 1:
        raise InputError(f"state {entry['name']!r} does not have the name or the shape of its kind")
    return state
