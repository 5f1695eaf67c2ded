"""Streaming statistics: memory depends on the program, never on the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qinvert.execute import run_checked
from qinvert.program import Program


class RangeObserver:
    """``max|x|`` of every tensor of a program, over all matrices seen.

    Programs run in float32 on unquantized input.  A value that overflows
    makes the range infinite.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.ranges = dict.fromkeys(program.tensors, 0.0)

    def update(self, lower: torch.Tensor) -> None:
        """Add checked matrices ``[B, C, C]``."""
        run_checked(self.program, lower, torch.float32, self._observe)

    def _observe(self, name: str, tensor: torch.Tensor) -> None:
        largest = float(tensor.abs().max())
        # max() of a NaN would lose it; powers give NaN as inf - inf.
        self.ranges[name] = max(self.ranges[name], math.inf if math.isnan(largest) else largest)


class MatrixSample:
    """A uniform random sample of matrices of one layer, at most ``capacity``.

    Reservoir sampling by random keys: each matrix draws a key, the largest
    keys stay.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0)
        self._kept: torch.Tensor | None = None

    def update(self, lower: torch.Tensor) -> None:
        """Offer matrices ``[B, C, C]``."""
        keys = torch.cat([self._keys, torch.rand(lower.shape[0], generator=self._generator)])
        order = torch.topk(keys, min(self.capacity, len(keys))).indices
        old = [] if self._kept is None else [self._kept]
        # Copies, so that the rest of the batch can be freed.
        self._kept = torch.cat([*old, lower.to(torch.float32)])[order.to(lower.device)].clone()
        self._keys = keys[order]

    @property
    def matrices(self) -> torch.Tensor:
        """The sample, float32 ``[n, C, C]``."""
        if self._kept is None:
            raise RuntimeError("no matrix was offered yet")
        return self._kept


class LayerObserver:
    """Everything that is remembered of one layer: ranges per candidate and a sample."""

    def __init__(self, programs: Sequence[Program], capacity: int, seed: int) -> None:
        self.ranges = [RangeObserver(program) for program in programs]
        self.sample = MatrixSample(capacity, seed)
        self.chunk = programs[0].chunk
        self.matrices = 0

    def update(self, lower: torch.Tensor) -> None:
        """Add checked matrices ``(..., C, C)``."""
        flat = lower.reshape(-1, *lower.shape[-2:])
        self.matrices += flat.shape[0]
        self.sample.update(flat)
        for observer in self.ranges:
            observer.update(flat)
