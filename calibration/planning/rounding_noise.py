"""Ranges of tensors that are zero in real arithmetic and hold only rounding residue.

The residual ``R = M S + M - S`` of a correction vanishes in a float run, so
its range shows only once its inputs are quantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

import torch

from qinvert.calibration.planning.scales import ScaleRule, choose_quantizations, choose_scale, scale_groups
from qinvert.execution.floating import FloatEvaluator
from qinvert.execution.inputs import program_inputs
from qinvert.formats import IntFormat
from qinvert.numerics import rounding
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.program import Program
from qinvert.systems import Systems

#: Room above the largest residue seen on the sample.
MARGIN: Final = 4.0
#: A tensor that stays this far below M in a float run holds a residue.
SMALL: Final = 0.01


class _ResidueEvaluator(FloatEvaluator):
    """Runs steps in float64 on quantized inputs, and widens ranges that turn out too small."""

    def __init__(
        self, batch: int, device: torch.device, tensors: dict[str, Quantization], free: set[str]
    ) -> None:
        super().__init__(batch, torch.float64, device)
        self.tensors = tensors
        self.free = free
        self.widened: dict[str, float] = {}

    def stored(self, name: str, values: torch.Tensor) -> torch.Tensor:
        grid = self.tensors[name]
        largest = float(values.abs().max())
        if name in self.free and largest > 2 * grid.limit:
            self.widened[name] = MARGIN * largest
            scale = choose_scale(self.widened[name], grid.format, ScaleRule.FLOAT)
            grid = Quantization(format=grid.format, scale=scale)
        integers = rounding.quantize(values, grid.scale, grid.format)
        return rounding.dequantize(integers, grid.scale, grid.format).to(torch.float64)


def settle_residues(
    program: Program,
    ranges: Mapping[str, float],
    sample: Systems,
    formats: Mapping[str, IntFormat],
) -> dict[str, float]:
    """Return ``ranges`` with residue tensors at `MARGIN` times what they reach on the sample.

    A tensor counts as residue if it shares its grid with no other, stayed below
    `SMALL` times M in the float run, and exceeds that range more than
    twice once its inputs are quantized.

    Parameters
    ----------
    program : Program
    ranges : mapping
        max|x| per tensor of float runs over all data.
    sample : Systems
        Flat systems, with beta where the program takes it.
    formats : mapping
        Format of every tensor.
    """
    tensors = choose_quantizations(program, ranges, formats, ScaleRule.FLOAT, Requantize.DIVIDE)
    groups = scale_groups(program)
    sizes = Counter(groups.values())
    small = SMALL * ranges[program.inverse_ports.matrix]
    free = {name for name, group in groups.items() if sizes[group] == 1 and ranges[name] <= small}
    if not free:
        return dict(ranges)
    evaluator = _ResidueEvaluator(sample.count, sample.lower.device, tensors, free)
    inputs = {
        name: evaluator.stored(name, value)
        for name, value in program_inputs(program, sample, torch.float64).items()
    }
    program.evaluate(evaluator, inputs)
    return {**ranges, **evaluator.widened}
