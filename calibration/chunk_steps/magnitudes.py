"""Magnitudes of the values of a sample, in prefill and in decoding, for the choice of clipped ranges."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import torch

from qinvert.calibration.chunk_steps.decoded_tokens import observe_decoding
from qinvert.delta_rule.chunks import DeltaChunks
from qinvert.execution.chunk_steps import run_float
from qinvert.plan.value_channels import ValueChannels
from qinvert.program.program import Program

#: Magnitudes of one tensor that are kept of one call of an observer.
MAGNITUDES: Final = 2**16


class Magnitudes:
    """Magnitudes above zero of some tensors of a step; the sample runs once for each choice of channels.

    Parameters
    ----------
    program : Program
        A chunk step.
    names : collection of str
        Tensors that are looked at.
    sample : DeltaChunks
    """

    def __init__(self, program: Program, names: Collection[str], sample: DeltaChunks) -> None:
        self._program, self._names, self._sample = program, frozenset(names), sample
        self._found: dict[ValueChannels | None, Mapping[str, torch.Tensor]] = {}

    def of(self, channels: ValueChannels | None) -> Mapping[str, torch.Tensor]:
        """Return magnitudes by tensor, of values that these channels have divided or rotated."""
        if channels not in self._found:
            self._found[channels] = self._observed(channels)
        return self._found[channels]

    def _observed(self, channels: ValueChannels | None) -> Mapping[str, torch.Tensor]:
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in self._names}

        def observe(name: str, values: torch.Tensor) -> None:
            if name in parts:
                magnitudes = values.abs().flatten()[:: max(1, values.numel() // MAGNITUDES)]
                parts[name].append(magnitudes[magnitudes > 0])

        run_float(self._program, self._sample, observe=observe, channels=channels)
        observe_decoding(self._program, self._sample, observe, channels)
        return {name: torch.cat(found) for name, found in parts.items() if found}
