"""What callers may ask of a graph, by name."""

from __future__ import annotations

from enum import StrEnum
from typing import Final, TypedDict

#: What a graph takes and returns, where a caller leaves it to the program's ports.
AUTO: Final = "auto"


class GraphInput(StrEnum):
    """What a graph starts from."""

    #: The matrices L.
    L = "L"
    #: M = -L, which saves the sign flip.
    M = "M"
    #: Unit keys, beta and log decays; the graph builds L from them in float32.
    KEYS = "keys"
    #: The input ports of a program that does not compute an inverse, as they are.
    PORTS = "ports"


class GraphOutput(StrEnum):
    """What a graph returns."""

    #: T in float32.
    T = "T"
    #: The integers of the program's results, as they are stored, for integer products that follow.
    INTEGERS = "integers"
    #: The output ports of a program that does not compute an inverse, in float32.
    PORTS = "ports"


class Options(TypedDict, total=False):
    """What graphs take and return, as in `qinvert.export`."""

    batch: int | str | None
    input: str
    output: str
    key_size: int | None
    input_type: str
    chains: int | str
    heads: int | None
    chunks: int | None
    layout: str | None
    normalize: bool | None
    states: str | None
    opset: int | None
    ir_version: int | None


#: Options of graphs of whole chunk steps only.
STEP_OPTIONS: Final = ("heads", "chunks", "layout", "normalize", "states")


class InputType(StrEnum):
    """How matrices enter a graph."""

    #: Real numbers, which the graph quantizes.
    FLOAT32 = "float32"
    #: Integers on the plan's grid of M, as the profile stores them at the ends of graphs.
    INTEGERS = "integers"
