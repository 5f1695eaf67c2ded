"""The states that a call of a deployed graph takes and returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import torch

from qinvert.errors import ExportError

#: End of the name under which a graph returns a state.
SUFFIX: Final = "_out"


class StateKind(StrEnum):
    """What a state holds."""

    #: State of a layer's delta rule, on its grid: ``[1, heads, Dv, Dk]`` or ``[1, heads, Dk, Dv]``.
    RECURRENT = "recurrent"
    #: The last ``kernel - 1`` inputs of a convolution, ``[1, channels, kernel - 1]``.
    CONVOLUTION = "convolution"
    #: Keys of an attention layer, oldest first, ``[1, heads, cache, size]``.
    KEYS = "keys"
    #: Values of an attention layer, as keys.
    VALUES = "values"
    #: Which entries of the caches hold a token, ``[1, 1, 1, cache]``: 1 or 0.
    VISIBLE = "visible"
    #: How many tokens there were before, int32 ``[1]``.
    POSITION = "position"
    #: Keys of the full blocks that sparse attention chooses among, by their numbers, ``[1, blocks, size]``.
    BLOCKS = "blocks"
    #: What the key of the block that is not full will be made of, ``[1, tokens of a block, width]``.
    TAIL = "tail"
    #: Block of the token in every entry of the caches, int32 ``[cache]``; numbered by the tokens of a block.
    ENTRIES = "entries"


#: What is counted.
WHOLE_NUMBERS: Final = frozenset({StateKind.POSITION, StateKind.ENTRIES})


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One state."""

    kind: StateKind
    shape: tuple[int, ...]
    #: Number of the layer in the model; None for states that all layers share.
    layer: int | None = None
    #: Which of a layer's states of this kind.
    index: int = 0

    @property
    def name(self) -> str:
        """Name of the graph's input."""
        return state_name(self.kind, self.layer, self.index)

    @property
    def element(self) -> str:
        """NumPy name of its type."""
        return "int32" if self.kind in WHOLE_NUMBERS else "float32"

    def zeros(self) -> torch.Tensor:
        """What it is before the first token."""
        return torch.zeros(self.shape, dtype=getattr(torch, self.element))

    def to_json(self) -> dict[str, Any]:
        """Describe it for a host, as JSON types."""
        return {
            "name": self.name,
            "output": self.name + SUFFIX,
            "kind": str(self.kind),
            "layer": self.layer,
            "index": self.index,
            "shape": list(self.shape),
            "type": self.element,
        }


def state_name(kind: StateKind, layer: int | None, index: int = 0) -> str:
    """Name of a state: its kind, the layer, and its number where a layer has several."""
    place = "" if layer is None else f"_{layer}"
    return f"{kind}{place}{f'_{index}' if index else ''}"


@dataclass(slots=True, kw_only=True)
class Traffic:
    """The states of one call: those that it was given, and those that it returns.

    Without given states it is a probe: every state that is asked for is taken for zeros and noted.
    """

    #: Tokens that the caches of attention layers hold.
    cache: int
    given: dict[str, torch.Tensor] | None = None
    returned: dict[str, torch.Tensor] = field(default_factory=dict)
    found: dict[str, State] = field(default_factory=dict)

    def take(
        self, kind: StateKind, shape: tuple[int, ...], layer: int | None, index: int = 0
    ) -> torch.Tensor:
        """Return a state of the last call.

        Raises
        ------
        ExportError
            If a layer asks for a state that it did not have before.
        """
        state = State(kind=kind, shape=tuple(map(int, shape)), layer=layer, index=index)
        if self.given is None:
            self.found[state.name] = state
            return state.zeros()
        if state.name not in self.given:
            raise ExportError(
                f"the model uses {state.name} in some calls only, so that it has no fixed states"
            )
        return self.given[state.name]

    def give(self, kind: StateKind, value: torch.Tensor, layer: int | None, index: int = 0) -> None:
        """Hand a state to the next call."""
        self.returned[state_name(kind, layer, index)] = value
