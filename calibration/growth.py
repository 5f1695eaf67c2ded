"""Range growth: how far powers of M outgrow the inverse."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from qinvert.calibration.observation.ranges import RangeObserver
from qinvert.calibration.sources import check_size
from qinvert.execution.inputs import program_inputs
from qinvert.methods.neumann_doubling import neumann_doubling
from qinvert.systems import Systems


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeGrowth:
    """Largest magnitudes in one layer, over all its matrices."""

    #: Matrices seen.
    matrices: int
    #: max|M^k| by k, for k = 1, 2, 4, ... C / 2.
    powers: dict[int, float]
    #: max|T| below the diagonal.
    inverse: float

    @property
    def growth(self) -> float:
        """Largest power over the larger of max|M| and max|T|."""
        return max(self.powers.values()) / max(self.inverse, self.powers[1], torch.finfo(torch.float32).tiny)


class GrowthObserver:
    """Streams `RangeGrowth` of one layer of C x C matrices."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self._powers = RangeObserver(neumann_doubling(chunk))
        self._matrices = 0
        self._inverse = 0.0

    def update(self, systems: Systems) -> None:
        """Add checked systems."""
        flat = systems.flat()
        self._matrices += flat.count
        self._powers.update(program_inputs(self._powers.program, flat, torch.float32))
        self._inverse = max(self._inverse, float(torch.tril(flat.inverse(), -1).abs().max()))

    def result(self) -> RangeGrowth:
        """Return the growth seen so far."""
        ranges = self._powers.ranges
        powers = {1: ranges[self._powers.program.inverse_ports.matrix]}
        for name, largest in ranges.items():
            if name.startswith("power_"):
                powers[int(name.removeprefix("power_"))] = largest
        return RangeGrowth(matrices=self._matrices, powers=powers, inverse=self._inverse)


def range_growth(matrices: Iterable[tuple[str, torch.Tensor]]) -> dict[str, RangeGrowth]:
    """Return the growth per layer of ``(layer, checked L)`` pairs, in one pass."""
    observers: dict[str, GrowthObserver] = {}
    for layer, lower in matrices:
        if layer not in observers:
            observers[layer] = GrowthObserver(lower.shape[-1])
        check_size(lower.shape[-1], observers[layer].chunk, layer)
        observers[layer].update(Systems(lower=lower))
    return {layer: observer.result() for layer, observer in observers.items()}
