"""How much noise each grid adds to the result, measured by rounding one grid at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from qinvert.calibration.planning.scales import scale_groups
from qinvert.calibration.planning.variants import ALL, VariantEvaluator, Variants, alone, on_grid
from qinvert.execution.inputs import only, program_inputs
from qinvert.formats import IntFormat
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import InversePorts
from qinvert.program.program import Program
from qinvert.program.residual_sums import residual_sums
from qinvert.systems import Systems

#: Matrices of the sample that predictions use.
MATRICES: Final = 8
#: Name under which `Sensitivities.shares` lists the truncation.
TRUNCATION: Final = "truncation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivities:
    """Noise power at the result, by grid and format.

    Rounding errors of different grids are nearly independent, so powers add:

        sqnr = 10 log10(signal / (truncation + sum_g c[f_g] noise[g, f_g])),

    with ``f_g`` the format of group g.  What the sum misses (errors that
    cancel, residues that others leave) is in the factor ``c`` of each format:
    it makes the sum exact where all grids have that format.
    """

    #: Sum of squares of tril(T, -1).
    signal: float
    #: What the program misses in exact arithmetic: the tail of a series that is cut off.
    truncation: float
    #: (group of tensors that share a grid, format name) -> sum of squares of the error.
    noise: Mapping[tuple[str, str], float]
    #: Format name -> noise with all grids rounded, over the sum of their noises.
    coherence: Mapping[str, float]
    #: Group of every input, by the variant that rounds the input without what only shares its grid.
    inputs: Mapping[str, str]
    #: Group of the result.
    output: str
    #: Format name -> noise of an exact result that is put on the output's grid.
    rounding: Mapping[str, float]

    def sqnr_db(self, formats: Mapping[str, IntFormat]) -> float:
        """Predicted sqnr under a format for every group."""
        return self._decibels(self.truncation + self.total(formats))

    def total(self, formats: Mapping[str, IntFormat]) -> float:
        """Predicted noise power of all grids."""
        return sum(self.coherence[f.name] * self.noise[g, f.name] for g, f in formats.items())

    def floor_db(self, formats: Mapping[str, IntFormat]) -> float:
        """Predicted sqnr of an exact algorithm on the same input and output grids."""
        noise = sum(self.noise[variant, formats[group].name] for variant, group in self.inputs.items())
        return self._decibels(noise + self.rounding[formats[self.output].name])

    def shares(self, formats: Mapping[str, IntFormat]) -> dict[str, float]:
        """Return the share of the noise that each group adds, largest first."""
        noise = {group: self.noise[group, fmt.name] for group, fmt in formats.items()}
        noise[TRUNCATION] = self.truncation
        total = sum(noise.values()) or 1.0
        return {g: n / total for g, n in sorted(noise.items(), key=lambda item: -item[1])}

    def _decibels(self, noise: float) -> float:
        if not math.isfinite(noise):
            return -math.inf
        if noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / noise) if self.signal else -math.inf


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerGrids:
    """Grids of a program that are measured on the sample of one layer."""

    #: A quantization of every tensor, once per format.
    grids: Sequence[Mapping[str, Quantization]]
    #: Flat systems, with beta where the program takes it.
    sample: Systems
    #: Exact inverses of the sample, ``[n, C, C]``.
    truth: torch.Tensor
    #: Form of `Requantize` by the name of a format.
    requantize: Mapping[str, Requantize]


def measure_sensitivities(
    program: Program,
    grids: Sequence[Mapping[str, Quantization]],
    sample: Systems,
    truth: torch.Tensor | None = None,
    requantize: Mapping[str, Requantize] | None = None,
) -> Sensitivities:
    """Round every group of tensors by itself and measure the error of the result.

    Parameters
    ----------
    program : Program
    grids : sequence of mappings
        A quantization of every tensor, once per format.
    sample : Systems
        Flat systems, with beta where the program takes it; noise is measured on the
        first `MATRICES`.
    truth : torch.Tensor, shape ``[n, C, C]``, optional
        Exact inverses of the sample, where a caller has them already.
    requantize : mapping, optional
        Form of `Requantize` by the name of a format; all plans divide by default.
    """
    ports = program.inverse_ports
    layer = LayerGrids(
        grids=grids,
        sample=sample,
        truth=sample.inverse() if truth is None else truth,
        requantize=requantize or {_format_of(grid, ports): Requantize.DIVIDE for grid in grids},
    )
    (found,) = measure_together(program, [layer])
    return found


def measure_together(
    program: Program, layers: Sequence[LayerGrids], at_once: int | None = None
) -> list[Sensitivities]:
    """`measure_sensitivities` of several layers in one run of the program.

    At least `MATRICES` of each sample, or the same number of all, must be there.
    With ``at_once`` the run is as large as that of so many layers.
    """
    asked, count = layers, max(len(layers), at_once or 0)
    layers = [asked[i % len(asked)] for i in range(count)]
    groups = scale_groups(program)
    each = dict.fromkeys((*groups.values(), ALL, *_input_variants(program, groups)))
    variants = [
        Variants(listed=[(v, grid) for grid in layer.grids for v in each], requantize=layer.requantize)
        for layer in layers
    ]
    samples = [layer.sample[:MATRICES].to(torch.float64) for layer in layers]
    first = samples[0]
    evaluator = VariantEvaluator(program, variants, first.count, first.lower.device)
    exact = [program_inputs(program, sample, torch.float64) for sample in samples]
    copied = [
        {name: value.repeat(own.copies, 1, 1) for name, value in inputs.items()}
        for own, inputs in zip(variants, exact, strict=True)
    ]
    given = {
        name: evaluator.stored(name, torch.cat([inputs[name] for inputs in copied])) for name in exact[0]
    }
    result = only(program.evaluate(evaluator, given)).reshape(-1, *first.lower.shape)
    parts = torch.split(result, [own.copies for own in variants])
    return [
        _read(program, layer, own, part, inputs)
        # What fills the run up comes behind the layers that were asked for.
        for layer, own, part, inputs in zip(asked, variants, parts, exact, strict=False)
    ]


def _read(
    program: Program,
    layer: LayerGrids,
    variants: Variants,
    result: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
) -> Sensitivities:
    """Return the noise of one layer from the results of its copies, ``[copies, n, C, C]``."""
    ports, groups, grids = program.inverse_ports, scale_groups(program), layer.grids
    exact = torch.tril(layer.truth, -1)
    # Rare large matrices would make the signal of a few a poor guess.
    share = min(1.0, MATRICES / layer.sample.count)
    signal = float(exact.square().sum()) * share
    unseen = {_format_of(grid, ports): _unseen_saturation(exact, grid, ports, share) for grid in grids}
    exact = exact[:MATRICES]
    rows = torch.ones((), dtype=torch.float64) if ports.beta is None else inputs[ports.beta]
    rounding = {
        name: _power((_at_output(result[-1], grid[ports.result]) - result[-1]) * rows) + unseen[name]
        for name, grid in zip(unseen, grids, strict=True)
    }
    result = result * rows
    errors = torch.tril(result[:-1] - result[-1:], -1).square().sum((1, 2, 3)).tolist()
    noise = {
        (g, _format_of(grid, ports)): math.inf if math.isnan(e) else float(e)
        for (g, grid), e in zip(variants.listed, errors, strict=True)
    }
    # In the order of the program: floats of a set would be summed in the order of their hashes.
    apart = tuple(dict.fromkeys(groups.values()))
    coherence = {f: _coherence(noise, apart, f) for g, f in noise if g == ALL}
    for name, power in unseen.items():
        noise[groups[ports.result], name] += power
    return Sensitivities(
        signal=signal,
        # A program that is exact in real arithmetic leaves rounding of float64 only.
        truncation=_power(result[-1] - exact),
        noise={(g, f): value for (g, f), value in noise.items() if g != ALL},
        coherence=coherence,
        inputs=_input_variants(program, groups),
        output=groups[ports.result],
        rounding=rounding,
    )


def _at_output(values: torch.Tensor, grid: Quantization) -> torch.Tensor:
    return on_grid(values, grid.scale, grid.format)


def _format_of(grid: Mapping[str, Quantization], ports: InversePorts) -> str:
    """Name of the format that all tensors of ``grid`` have."""
    return grid[ports.matrix].format.name


def _unseen_saturation(
    exact: torch.Tensor, grid: Mapping[str, Quantization], ports: InversePorts, share: float
) -> float:
    """Return the power that a clipped output range cuts off, beyond what the first matrices show.

    Rare large values are part of the signal; what saturation takes from them must be noise.
    """
    output = grid[ports.result]
    # The output of a factored program is T - I over beta; its rare values are those of keys alone.
    if ports.factored:
        return 0.0
    excess = (exact.abs() - output.scale * output.format.largest).clamp(min=0).square().sum((1, 2))
    return max(0.0, float(excess.sum()) * share - float(excess[:MATRICES].sum()))


def _power(error: torch.Tensor) -> float:
    power = float(torch.tril(error, -1).square().sum())
    return math.inf if math.isnan(power) else power


def _input_variants(program: Program, groups: Mapping[str, str]) -> dict[str, str]:
    """Return the group of every input, by the variant that rounds it: the group itself if all else moves."""
    shares = bool(residual_sums(program))
    ports = [port.tensor for port in program.inputs]
    return {alone(name) if shares else groups[name]: groups[name] for name in ports}


def _coherence(noise: Mapping[tuple[str, str], float], groups: Sequence[str], name: str) -> float:
    apart = sum(noise[group, name] for group in groups)
    together = noise[ALL, name]
    return together / apart if 0 < apart < math.inf and together < math.inf else 1.0
