"""How much noise each grid adds to the result, measured by rounding one grid at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from qinvert.calibration.planning.scales import scale_groups
from qinvert.execution.floating import FloatEvaluator
from qinvert.execution.inputs import only, program_inputs
from qinvert.execution.tensors import along
from qinvert.formats import IntFormat
from qinvert.numerics import rounding
from qinvert.numerics.exact import planes
from qinvert.plan.integer_product import PlanePairs, Product, operands, plane_pairs
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import InversePorts
from qinvert.program.program import Program
from qinvert.program.residual_sums import residual_sums
from qinvert.program.steps import MatMul, Scale
from qinvert.systems import Systems

#: Matrices of the sample that predictions use.
MATRICES: Final = 8
#: Name under which `Sensitivities.shares` lists the truncation.
TRUNCATION: Final = "truncation"
#: A tensor this far below one step holds what float64 left of a cancellation.
VANISHING: Final = 1e-3
#: Group that stands for all groups at once.
ALL: Final = "*"
#: Seed of the noise that stands for the rounding of residues.
SEED: Final = 0


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


#: One group that is rounded while all others stay exact, and the grids of all tensors.
Variant = tuple[str, Mapping[str, Quantization]]


class _VariantEvaluator(FloatEvaluator):
    """Runs steps in float64 on copies of the sample: one copy per variant, and one that stays exact."""

    def __init__(
        self,
        program: Program,
        variants: Sequence[Variant],
        count: int,
        device: torch.device,
        requantize: Mapping[str, Requantize],
    ) -> None:
        super().__init__((len(variants) + 1) * count, torch.float64, device)
        self.count = count
        self.requantize = requantize
        self.generator = torch.Generator(device="cpu").manual_seed(SEED)
        groups = scale_groups(program)
        self.rounded: dict[str, list[tuple[int, Quantization]]] = {name: [] for name in groups}
        for name, group in groups.items():
            self.rounded[name] = [
                (i, grid[name]) for i, (g, grid) in enumerate(variants) if g in (group, ALL, _alone(name))
            ]
        self.grids = [grid for _, grid in variants]

    def matmul(
        self,
        step: MatMul,
        left: torch.Tensor,
        right: torch.Tensor,
        add: list[torch.Tensor],
        subtract: list[torch.Tensor],
    ) -> torch.Tensor:
        for i in self._dropping(step):
            # The product of the low planes is left out.
            dropped = self._low(step.left, left, i) @ self._low(step.right, right, i)
            subtract = [*subtract, self._copy(dropped, i)]
        for i in self._rounding_planes(step):
            # The products of both planes of an int16 operand are rounded, not their sum.
            subtract = [*subtract, self._copy(self._rounding_of_high(step, left, right, i), i)]
        return super().matmul(step, left, right, add, subtract)

    def scale(self, step: Scale, source: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        total = source * along(step, vector)
        for i in self._dropping(step):
            # The same as in a product.
            low = along(step, self._low(step.vector, vector, i))
            total = total - self._copy(self._low(step.source, source, i) * low, i)
        return self.stored(step.output, total)

    def _dropping(self, step: Product) -> list[int]:
        return [i for i, _ in self.rounded[step.output] if self._pairs(i, step).drops_low]

    def _pairs(self, i: int, step: Product) -> PlanePairs:
        left, right = (self.grids[i][name].format for name in operands(step))
        return plane_pairs(left, right, splits_right=isinstance(step, MatMul))

    def _rounding_planes(self, step: MatMul) -> list[int]:
        return [
            i
            for i, grid in self.rounded[step.output]
            if self._pairs(i, step).rounded_apart(self.requantize[grid.format.name])
        ]

    def _rounding_of_high(
        self, step: MatMul, left: torch.Tensor, right: torch.Tensor, i: int
    ) -> torch.Tensor:
        grid, output = self.grids[i][step.right], self.grids[i][step.output]
        q = rounding.quantize(self._copies(right)[:, i], grid.scale, grid.format)
        high, scale = rounding.operand_planes(q, grid.scale, grid.format)[0]
        product = self._copies(left)[:, i] @ (high.to(torch.float64) * scale)
        return (product - output.scale * torch.round(product / output.scale)).flatten(0, 1)

    def _copy(self, values: torch.Tensor, i: int) -> torch.Tensor:
        """Return zeros except for variant ``i``."""
        blocks = values.reshape(-1, self.count, *values.shape[-2:])
        whole = blocks.new_zeros(len(blocks), self.batch // self.count, *blocks.shape[1:])
        whole[:, i] = blocks
        return whole.flatten(0, 2)

    def _copies(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, self.batch // self.count, self.count, *values.shape[1:])

    def _low(self, name: str, values: torch.Tensor, i: int) -> torch.Tensor:
        grid = self.grids[i][name]
        q = rounding.quantize(self._copies(values)[:, i], grid.scale, grid.format)
        low, scale = planes(q, grid.scale, grid.format)[-1]
        return low.to(torch.float64) * scale

    def stored(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Round the copies whose variant is the grid of ``name``."""
        # This is done in place, because a float step writes into fresh memory.
        for i, grid in self.rounded[name]:
            self._copies(values)[:, i] = self._rounded(self._copies(values)[:, i], grid)
        return values

    def _rounded(self, values: torch.Tensor, grid: Quantization) -> torch.Tensor:
        if float(values.abs().max()) < VANISHING * grid.scale:
            # A residue is almost zero here, but has many steps once its operands are rounded.
            noise = torch.rand(values.shape, generator=self.generator, dtype=torch.float64) - 0.5
            return values + grid.scale * torch.where(values != 0, noise.to(values.device), 0.0)
        return on_grid(values, grid)


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
    exact = torch.tril(sample.inverse() if truth is None else truth, -1)
    # Rare large matrices would make the signal of a few a poor guess.
    share = min(1.0, MATRICES / sample.count)
    signal = float(exact.square().sum()) * share
    unseen = {_format_of(grid, ports): _unseen_saturation(exact, grid, ports, share) for grid in grids}
    sample, exact = sample[:MATRICES].to(torch.float64), exact[:MATRICES]
    groups = scale_groups(program)
    inputs = _input_variants(program, groups)
    each = dict.fromkeys((*groups.values(), ALL, *inputs))
    variants = [(variant, grid) for grid in grids for variant in each]
    forms = requantize or {_format_of(grid, ports): Requantize.DIVIDE for grid in grids}
    evaluator = _VariantEvaluator(program, variants, sample.count, sample.lower.device, forms)
    exact_inputs = program_inputs(program, sample, torch.float64)
    given = {
        name: evaluator.stored(name, value.repeat(len(variants) + 1, 1, 1))
        for name, value in exact_inputs.items()
    }
    result = only(program.evaluate(evaluator, given))
    result = result.reshape(len(variants) + 1, *sample.lower.shape)
    rows = torch.ones((), dtype=torch.float64) if ports.beta is None else exact_inputs[ports.beta]
    rounding = {
        name: _power((on_grid(result[-1], grid[ports.result]) - result[-1]) * rows) + unseen[name]
        for name, grid in zip(unseen, grids, strict=True)
    }
    result = result * rows
    errors = torch.tril(result[:-1] - result[-1:], -1).square().sum((1, 2, 3)).tolist()
    noise = {
        (g, _format_of(grid, ports)): math.inf if math.isnan(e) else float(e)
        for (g, grid), e in zip(variants, errors, strict=True)
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
        inputs=inputs,
        output=groups[ports.result],
        rounding=rounding,
    )


def _format_of(grid: Mapping[str, Quantization], ports: InversePorts) -> str:
    """Name of the format that all tensors of ``grid`` have."""
    return grid[ports.matrix].format.name


def on_grid(values: torch.Tensor, grid: Quantization) -> torch.Tensor:
    """Return float64 values rounded onto a grid; NaN, from inf - inf, counts as infinite."""
    finite = torch.nan_to_num(values, nan=math.inf, posinf=math.inf, neginf=-math.inf)
    integers = rounding.quantize(finite, grid.scale, grid.format)
    return rounding.dequantize(integers, grid.scale, grid.format).to(torch.float64)


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


def _alone(name: str) -> str:
    return f"{name} alone"


def _input_variants(program: Program, groups: Mapping[str, str]) -> dict[str, str]:
    """Return the group of every input, by the variant that rounds it: the group itself if all else moves."""
    shares = bool(residual_sums(program))
    ports = [port.tensor for port in program.inputs]
    return {_alone(name) if shares else groups[name]: groups[name] for name in ports}


def _coherence(noise: Mapping[tuple[str, str], float], groups: Sequence[str], name: str) -> float:
    apart = sum(noise[group, name] for group in groups)
    together = noise[ALL, name]
    return together / apart if 0 < apart < math.inf and together < math.inf else 1.0
