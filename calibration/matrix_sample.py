"""A few matrices of every entry of a plan, kept while a stream of them goes by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch

from qinvert.calibration.growth import GrowthObserver, RangeGrowth
from qinvert.calibration.head_names import is_split
from qinvert.calibration.heads import split_heads
from qinvert.calibration.simulate import match_layer
from qinvert.calibration.sources import Item
from qinvert.plan.plan import Plan
from qinvert.systems import Systems

#: Matrices that are kept of one item of the stream, and of one entry.
OF_ITEM: Final = 16
OF_ENTRY: Final = 64
#: Elements of the matrices that are kept of one entry.
ELEMENTS: Final = 2**18


class MatrixSample:
    """Keeps some matrices of every entry, and the range growth of every layer over all of them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._growth: dict[str, GrowthObserver] = {}
        self._parts: dict[str, list[Systems]] = {}

    def watched(self, stream: Iterable[Item]) -> Iterator[tuple[str, Any]]:
        """Pass on ``(layer, L)`` or ``(layer, (L, beta))``, as `qinvert.simulate` takes them."""
        for given, systems in stream:
            self.update(given, systems)
            yield given, systems.lower if systems.beta is None else (systems.lower, systems.beta)

    def update(self, given: str, systems: Systems) -> None:
        """Add the checked systems of one item.

        Raises
        ------
        PlanError
            If the plan has no such layer.
        """
        layer = match_layer(self._plan, given)
        self._growth.setdefault(layer, GrowthObserver(systems.chunk)).update(systems)
        split = is_split(self._plan, layer)
        for name, part in split_heads(layer, systems) if split else [(layer, systems)]:
            self._keep(name, part.flat())

    def _keep(self, name: str, flat: Systems) -> None:
        kept = self._parts.setdefault(name, [])
        most = min(OF_ENTRY, max(2, ELEMENTS // flat.chunk**2))
        free = min(OF_ITEM, most - sum(part.count for part in kept))
        # Padding says nothing.
        filled = flat[flat.is_filled]
        if free > 0 and filled.count:
            # Heads and chunks follow each other in a fixed order, which a fixed step may fall in with.
            drawn = torch.Generator().manual_seed(len(kept))
            kept.append(filled[torch.randperm(filled.count, generator=drawn)[:free]])

    @property
    def growth(self) -> dict[str, RangeGrowth]:
        """Range growth by layer."""
        return {layer: observer.result() for layer, observer in self._growth.items()}

    @property
    def systems(self) -> dict[str, Systems]:
        """The matrices that were kept, by entry, ``[N, C, C]``."""
        return {name: _joined(parts) for name, parts in self._parts.items() if parts}


def _joined(parts: list[Systems]) -> Systems:
    betas = [part.beta for part in parts if part.beta is not None]
    beta = torch.cat(betas) if len(betas) == len(parts) else None
    return Systems(lower=torch.cat([part.lower for part in parts]), beta=beta)
