"""What a compiler says that a graph costs on a chip, without the chip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qinvert.errors import ExportError


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleEstimate:
    """Cycles of one call of a graph, as a vendor's compiler predicts them.

    Nothing was measured: compare such numbers only with others of the same `source`.
    """

    #: Name of the chip, such as ``"hexagon-v81"``.
    hardware: str
    #: Predicted cycles of one call, for the whole batch.
    cycles: int
    #: Ends of the compiler's own range, where it gives one.
    lower: int | None = None
    upper: int | None = None
    #: Time of one call at the clock that the compiler assumes, where it tells it.
    microseconds: int | None = None
    #: Cycles that parts of the chip are busy, at the same time as others, where the tool tells them.
    parts: Mapping[str, int] = field(default_factory=dict)
    #: What moves between the chip and its memories, by the tool's own names; bytes unless a name says
    #: otherwise.
    traffic: Mapping[str, int] = field(default_factory=dict)
    #: Operators for which the estimator has no cost: the cycles leave them out.
    uncosted: int = 0
    #: One sentence: who estimated for which chip, and that it was not measured.
    source: str
    #: Types that each product runs in, by name of the node.
    products: Mapping[str, str] = field(default_factory=dict)
    #: Nodes that do not run on the NPU.
    elsewhere: Sequence[str] = ()
    #: Files of the compiler that were kept, and how to load each.
    kept: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cycles <= 0 or self.uncosted < 0 or not self.source:
            raise ExportError(
                f"an estimate of {self.cycles} cycles with {self.uncosted} operators without a cost from "
                f"{self.source!r} is none; the estimator must report cycles above 0 and say who it is"
            )
        if not (self.lower or 0) <= self.cycles <= (self.upper or self.cycles):
            raise ExportError(
                f"{self.cycles} cycles are outside {self.lower} to {self.upper}; check the estimator's report"
            )

    @property
    def span(self) -> str:
        """Cycles with their range, for tables."""
        if self.lower is None or self.upper is None:
            return f"{self.cycles:,}"
        return f"{self.cycles:,} ({self.lower:,} to {self.upper:,})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a runtime is asked for beside the values of a graph."""

    #: Chips to estimate cycles for.
    hardware: Sequence[str] = ()
    #: Folder that gets the files that the compiler makes.
    keep: Path | None = None

    def document(self) -> dict[str, Any]:
        """Return what the file ``request.json`` holds."""
        return {"estimate": list(self.hardware), "keep": self.keep is not None}
