"""Triton source of the integer steps of a plan: the simulator's roundings, one at a time.

int8 values are exact as float16 operands and their accumulators in float32
below 2**24, so the matrix unit's float products are integer products.  Around
them are the IEEE float32 operations of `qinvert.numerics.rounding`, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from qinvert.formats import INT8, PLANE_RATIO, IntFormat
from qinvert.kernels.division import residual_steps
from qinvert.kernels.source import DIAGONAL, FLOAT16_EXACT, ZEROS, Source, Tile, TritonOps
from qinvert.kernels.statements import Expression, Kind, expression
from qinvert.kernels.tiles import Position, UnsupportedError
from qinvert.numerics.accumulators import FLOAT32_EXACT, plane_scales
from qinvert.numerics.scales import float32, is_power_of_two
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.sparsity import Support
from qinvert.program.steps import Add, MatMul, Rescale

#: Scales outside ``[1 / this, this]`` have no kernel: divisions must stay far from the ends of float32.
SCALE_LIMIT: Final = 2.0**30
#: Before they are divided, values are cut at this many steps of the lowest plane above the ends of
#: a format.  Every value that is cut would round to that end or saturate there.
CUT: Final = 0.25
#: ``(x + MAGIC) - MAGIC`` rounds half to even where ``|x| < 2**22``.  Two additions run at full
#: rate, and a conversion instruction runs at a fraction of it.
MAGIC: Final = 1.5 * 2**23


class IntegerOps(TritonOps):
    """The roundings of one plan.

    ``interpreted`` says that an interpreter runs them; it rounds a fused multiply-add twice.

    Raises
    ------
    UnsupportedError
        If a product is not exact with float16 operands and float32 accumulators.
    """

    def __init__(self, source: Source, plan: QuantizedProgram, interpreted: bool = False) -> None:
        super().__init__(source)
        self.plan = plan
        for name, quantization in plan.tensors.items():
            if quantization.format.is_wide:
                raise UnsupportedError(f"{quantization.format} of tensor {name!r} is not a float16 operand")
            if not 1 / SCALE_LIMIT <= quantization.scale <= SCALE_LIMIT:
                raise UnsupportedError(f"the scale of tensor {name!r} is outside [2**-30, 2**30]")
        # Every division has equally many residual steps, so that plans of one structure share a kernel.
        steps = max(residual_steps(q.scale) for q in plan.tensors.values())
        #: Function of the template that divides.
        self.division = "divide_slowly" if interpreted else f"divide_{steps}"
        for step in plan.program.steps:
            if isinstance(step, MatMul) and plan.products[step.output].bound >= FLOAT32_EXACT:
                raise UnsupportedError(f"accumulators of step {step.output!r} can reach 2**24")

    @property
    def fusable(self) -> bool:
        # A product with a power of two is exact, and so is the product of two integers of a residual.
        factors = [step.factor for step in self.plan.program.steps if isinstance(step, Rescale)]
        scales = [grid.scale for grid in self.plan.tensors.values()]
        return all(map(is_power_of_two, scales + factors))

    def load(self, position: Position) -> Tile:
        return replace(self._round(self.plan.program.inverse_ports.matrix, self.raw(position)), loaded=True)

    def mask(self, value: Tile, keep: Support, support: Support) -> Tile:
        masked = self._tile([self.where(name, keep, support) for name in value.values])
        return replace(masked, loaded=value.loaded)

    def merge(self, left: Tile, right: Tile) -> Tile:
        pairs = zip(left.values, right.values, strict=True)
        return self._tile([self.source.assign("{} + {}", a, b) for a, b in pairs])

    def matmul(
        self,
        step: MatMul,
        position: Position,
        pairs: Mapping[int, tuple[Tile, Tile]],
        add: Sequence[tuple[str, Tile]],
        subtract: Sequence[tuple[str, Tile]],
    ) -> Tile:
        signed = [*(("+", name, v) for name, v in add), *(("-", name, v) for name, v in subtract)]
        if self.plan.requantize is Requantize.MULTIPLIER:
            return self._multiplied(step, position, pairs, signed)
        terms = [("+", *accumulator) for accumulator in self._accumulators(step, pairs)]
        for sign, name, value in signed:
            values = replace(value, values=self._residual(value))
            terms += [(sign, *plane) for plane in self._planes(name, values)]
        return self._round(step.output, self._sum(terms))

    def _residual(self, value: Tile) -> tuple[Expression, ...]:
        """Return a tile's planes in the registers in which sums of products are."""
        if not value.loaded:
            return value.values
        # A product with the identity is exact, and cheaper than moving values between threads.
        ones = f"tl.broadcast_to(tl.where({DIAGONAL}, 1.0, 0.0), (NB, 16, 16))"
        identity = self.source.once("{}.to({})", ones, self.operand, kind=Kind.OPERAND)
        return tuple(self.chain([(operand, identity)], None) for operand in value.operands)

    def _multiplied(
        self,
        step: MatMul,
        position: Position,
        pairs: Mapping[int, tuple[Tile, Tile]],
        signed: Sequence[tuple[str, str, Tile]],
    ) -> Tile:
        products = {k: [a.operands[0], b.operands[0]] for k, (a, b) in pairs.items()}
        residuals, free = [], set(pairs)
        meaning = self.plan.products[step.output]
        for sign, name, value in signed:
            steps = meaning.identity(name)
            factor = self.source.scalar(float(steps))
            # left @ right + left = left @ (right + I), and I is `steps` on right's grid.
            side, k = (0, position[0]) if name == step.right else (1, position[1])
            if sign == "+" and k in free and steps + INT8.magnitude <= FLOAT16_EXACT:
                free.discard(k)
                products[k][side] = self._shifted(pairs[k][side], factor)
            else:
                minus = "-" if sign == "-" else ""
                residuals.append(self.source.assign("{}{} * {}", minus, self._residual(value)[0], factor))
        accumulator = self.chain(products.values(), self.total(residuals))
        multiplier = self.source.scalar(meaning.factor)
        product = expression("{} * {}", accumulator, multiplier)
        return self._tile([self._integers(self._limited(product, step.output))])

    def _shifted(self, value: Tile, steps: str) -> Expression:
        integers = value.values[0]
        shifted = expression("tl.where({}, {} + {}, {})", DIAGONAL, integers, steps, integers)
        return self.source.once("{}.to({})", shifted, self.operand, kind=Kind.OPERAND)

    def _accumulators(
        self, step: MatMul, pairs: Mapping[int, tuple[Tile, Tile]]
    ) -> list[tuple[Expression, str]]:
        if not pairs:
            return []
        accumulators = []
        for part in self.plan.products[step.output].accumulators:
            products = [(a.operands[i], b.operands[j]) for i, j in part.pairs for a, b in pairs.values()]
            accumulators.append((self.chain(products, None), self.source.scalar(part.unit)))
        return accumulators

    def add(self, step: Add, terms: Sequence[tuple[str, Tile]]) -> Tile:
        planes = [("+", *plane) for name, value in terms for plane in self._planes(name, value)]
        return self._round(step.output, self._sum(planes))

    def rescale(self, step: Rescale, source: Tile) -> Tile:
        if self.plan.keeps_integers(step):
            return source
        value = self._sum([("+", *plane) for plane in self._planes(step.source, source)])
        if step.factor != 1:
            factor = self.source.scalar(step.factor)
            value = self.source.assign("{} * {}", value, factor)
        return self._round(step.output, value)

    def real(self, value: Tile) -> Expression:
        planes = self._planes(self.plan.program.inverse_ports.result, value)
        return self._sum([("+", *plane) for plane in planes])

    def whole(self, value: Tile) -> Expression:
        """Return the integers of a tile, its planes together."""
        if len(value.values) == 1:
            return value.values[0]
        high, low = value.values
        return self.source.assign("{} * {} + {}", float(PLANE_RATIO), high, low)

    def _planes(self, name: str, value: Tile) -> list[tuple[Expression, str]]:
        scales = map(self.source.scalar, _plane_scales(self.plan.tensors[name]))
        return list(zip(value.values, scales, strict=True))

    def _sum(self, terms: Sequence[tuple[str, Expression, str]]) -> Expression:
        # Every product and every sum is rounded, see `fusable`.
        total = None
        for sign, plane, scale in terms:
            start = "" if total is None and sign == "+" else expression("{} {} ", total or 0.0, sign)
            total = self.source.assign("{}{} * {}", start, plane, scale)
        return total or self.source.once(ZEROS)

    def _round(self, name: str, value: Expression) -> Tile:
        grid = self.plan.tensors[name]
        fmt = grid.format if grid.format.planes == 1 else INT8
        scales = _plane_scales(grid)
        lowest, highest = (
            float32(sum(end * scale for scale in scales) + CUT * grid.scale)
            for end in (fmt.minimum, fmt.maximum)
        )
        value = self._clamped(value, self.source.scalar(lowest), self.source.scalar(highest))
        planes: list[Expression] = []
        for i, scale in enumerate(scales):
            unit = self.source.scalar(scale)
            reciprocal = self.source.scalar(float32(1 / scale))
            quotient = expression("{}({}, {}, {})", self.division, value, unit, reciprocal)
            if i > 0:  # half a step of the high plane is 128 of the low one
                quotient = expression("tl.minimum({}, {})", quotient, float(fmt.maximum))
            planes.append(self._integers(self.source.assign("{}", quotient)))
            if i + 1 < grid.format.planes:
                value = self.source.assign("{} - {} * {}", value, planes[-1], unit)
        return self._tile(planes)

    def _limited(self, steps: Expression, name: str) -> Expression:
        # Clamping before rounding gives the same result, because the bounds are integers.
        fmt = self._format(name)
        return self._clamped(steps, float(fmt.minimum), float(fmt.maximum))

    def _clamped(self, value: Expression, lowest: str | float, highest: str | float) -> Expression:
        return self.source.assign("tl.minimum(tl.maximum({}, {}), {})", value, lowest, highest)

    def _integers(self, steps: Expression) -> Expression:
        return self.source.assign("({} + {}) - {}", steps, MAGIC, MAGIC)

    def _tile(self, values: Sequence[Expression]) -> Tile:
        return Tile(values=tuple(values), operands=tuple(map(self.converted, values)))

    def _format(self, name: str) -> IntFormat:
        return self.plan.tensors[name].format


def _plane_scales(grid: Quantization) -> tuple[float, ...]:
    return plane_scales(grid.format, grid.scale, right=False)
