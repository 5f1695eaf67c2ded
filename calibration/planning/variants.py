"""Runs a program on copies of samples, and rounds other grids in every copy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch

from qinvert.calibration.planning.scales import scale_groups
from qinvert.execution.floating import FloatEvaluator
from qinvert.execution.tensors import along
from qinvert.formats import IntFormat
from qinvert.numerics import rounding
from qinvert.numerics.exact import Scale as ScaleType
from qinvert.numerics.exact import planes
from qinvert.plan.integer_product import PlanePairs, Product, operands, plane_pairs
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.program import Program
from qinvert.program.steps import MatMul, Scale

#: A tensor this far below one step holds what float64 left of a cancellation.
VANISHING: Final = 1e-3
#: Group that stands for all groups at once.
ALL: Final = "*"
#: Seed of the noise that stands for the rounding of residues.
SEED: Final = 0

#: One group that is rounded while all others stay exact, and the grids of all tensors.
Variant: TypeAlias = tuple[str, Mapping[str, Quantization]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variants:
    """What is rounded on the sample of one layer: one copy per variant, and a last one that stays exact."""

    listed: Sequence[Variant]
    #: Form of `Requantize` by the name of a format.
    requantize: Mapping[str, Requantize]

    @property
    def copies(self) -> int:
        """Copies of the sample."""
        return len(self.listed) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Alike:
    """Copies in which one tensor is rounded to one format, each onto a grid of its own."""

    numbers: Sequence[int]
    scales: Sequence[float]
    format: IntFormat
    #: The same on the device; scales as ``[copies, 1, 1, 1]``.
    index: torch.Tensor
    scale: torch.Tensor


class VariantEvaluator(FloatEvaluator):
    """Runs steps in float64 on copies of the samples of layers.

    Values are ``[blocks, copies, matrices, rows, columns]``, with the first three axes in one.

    Parameters
    ----------
    program : Program
    layers : sequence of Variants
        The copies of the first layer come first.
    count : int
        Matrices of every sample.
    device : torch.device
    """

    def __init__(
        self, program: Program, layers: Sequence[Variants], count: int, device: torch.device
    ) -> None:
        super().__init__(sum(layer.copies for layer in layers) * count, torch.float64, device)
        self.count = count
        generators = [torch.Generator(device="cpu").manual_seed(SEED) for _ in layers]
        self._layers = [number for number, layer in enumerate(layers) for _ in range(layer.copies)]
        self._generators = [generators[number] for number in self._layers]
        self._requantize = [layers[number].requantize for number in self._layers]
        #: Group and grids of every copy; None for those that stay exact.
        self._variants: list[Variant | None] = [v for layer in layers for v in (*layer.listed, None)]
        groups = scale_groups(program)
        self.rounded = {name: list(self._where(name, group)) for name, group in groups.items()}
        self._alike = {name: list(self._together(found)) for name, found in self.rounded.items()}

    def _where(self, name: str, group: str) -> Iterator[tuple[int, Quantization]]:
        for i, variant in enumerate(self._variants):
            if variant is not None and variant[0] in (group, ALL, alone(name)):
                yield i, variant[1][name]

    def _together(self, rounded: Sequence[tuple[int, Quantization]]) -> Iterator[_Alike]:
        for fmt in dict.fromkeys(grid.format for _, grid in rounded):
            found = [(i, grid.scale) for i, grid in rounded if grid.format == fmt]
            numbers, scales = zip(*found, strict=True)
            scale = torch.tensor(scales, dtype=torch.float32, device=self.device)
            yield _Alike(
                numbers=numbers,
                scales=scales,
                format=fmt,
                index=torch.tensor(numbers, device=self.device),
                scale=scale.reshape(-1, 1, 1, 1),
            )

    def _grids(self, i: int) -> Mapping[str, Quantization]:
        variant = self._variants[i]
        assert variant is not None  # Copies that stay exact are never rounded.
        return variant[1]

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
        left, right = (self._grids(i)[name].format for name in operands(step))
        return plane_pairs(left, right, splits_right=isinstance(step, MatMul))

    def _rounding_planes(self, step: MatMul) -> list[int]:
        return [
            i
            for i, grid in self.rounded[step.output]
            if self._pairs(i, step).rounded_apart(self._requantize[i][grid.format.name])
        ]

    def _rounding_of_high(
        self, step: MatMul, left: torch.Tensor, right: torch.Tensor, i: int
    ) -> torch.Tensor:
        grid, output = self._grids(i)[step.right], self._grids(i)[step.output]
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
        grid = self._grids(i)[name]
        q = rounding.quantize(self._copies(values)[:, i], grid.scale, grid.format)
        low, scale = planes(q, grid.scale, grid.format)[-1]
        return low.to(torch.float64) * scale

    def stored(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Round the copies whose variant is the grid of ``name``."""
        # This is done in place, because a float step writes into fresh memory.
        copies = self._copies(values)
        for alike in self._alike[name]:
            copies[:, alike.index] = self._rounded(copies[:, alike.index], alike)
        return values

    def _rounded(self, values: torch.Tensor, alike: _Alike) -> torch.Tensor:
        result = on_grid(values, alike.scale, alike.format)
        largest = values.abs().amax((2, 3, 4)).amax(0).tolist()
        for j, (i, scale) in enumerate(zip(alike.numbers, alike.scales, strict=True)):
            if largest[j] < VANISHING * scale:
                # A residue is almost zero here, but has many steps once its operands are rounded.
                shape = values[:, j].shape
                noise = torch.rand(shape, generator=self._generators[i], dtype=torch.float64) - 0.5
                own = torch.where(values[:, j] != 0, noise.to(values.device), 0.0)
                result[:, j] = values[:, j] + scale * own
        return result


def alone(name: str) -> str:
    """Name of the variant that rounds an input without what only shares its grid."""
    return f"{name} alone"


def on_grid(values: torch.Tensor, scale: ScaleType, fmt: IntFormat) -> torch.Tensor:
    """Return float64 values rounded onto a grid; NaN, from inf - inf, counts as infinite."""
    finite = torch.nan_to_num(values, nan=math.inf, posinf=math.inf, neginf=-math.inf)
    integers = rounding.quantize(finite, scale, fmt)
    return rounding.dequantize(integers, scale, fmt).to(torch.float64)
