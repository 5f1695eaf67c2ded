"""Triton source of the float steps: rounded operands, float32 everywhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum

from qinvert.kernels.source import DIAGONAL, Source, Tile, TritonOps
from qinvert.kernels.statements import Expression, Kind, expression, summed
from qinvert.kernels.tiles import Position
from qinvert.program.sparsity import Support
from qinvert.program.steps import Add, MatMul, Rescale


class Precision(StrEnum):
    """What the operands of products are rounded to; sums and residual terms are float32."""

    #: 11 bits; beyond 65504 they overflow.
    FP16 = "fp16"
    #: 8 bits with the range of float32.
    BF16 = "bf16"
    #: 11 bits with the range of float32.
    TF32 = "tf32"
    #: Two float16 parts per operand and three products: about 22 bits in the range of float16.
    FP16X3 = "fp16x3"
    #: float32, without the matrix unit.
    IEEE = "ieee"


_OPERANDS = {Precision.FP16: "tl.float16", Precision.FP16X3: "tl.float16", Precision.BF16: "tl.bfloat16"}


class FloatOps(TritonOps):
    """Products of one precision.

    ``exact`` says that the input's type loses nothing as an operand.
    """

    def __init__(self, source: Source, precision: Precision, exact: bool = False) -> None:
        super().__init__(source)
        self.precision = precision
        self.exact = exact
        self.operand = _OPERANDS.get(precision, "tl.float32")
        if precision not in _OPERANDS:
            self.dot_options = f', input_precision="{precision}"'

    @property
    def fusable(self) -> bool:
        return True

    def load(self, position: Position) -> Tile:
        return replace(self._tile(self.raw(position)), loaded=self.exact)

    def mask(self, value: Tile, keep: Support, support: Support) -> Tile:
        return replace(self._tile(self.where(value.values[0], keep, support)), loaded=value.loaded)

    def merge(self, left: Tile, right: Tile) -> Tile:
        return self._tile(self.source.assign("{} + {}", left.values[0], right.values[0]))

    def matmul(
        self,
        step: MatMul,
        position: Position,
        pairs: Mapping[int, tuple[Tile, Tile]],
        add: Sequence[tuple[str, Tile]],
        subtract: Sequence[tuple[str, Tile]],
    ) -> Tile:
        # With two parts per operand, the product of the low ones is below the last bit.
        groups = [(0, 0), (0, 1), (1, 0)] if self.precision is Precision.FP16X3 else [(0, 0)]
        products = {
            (k, g): [a.operands[g[0]], b.operands[g[1]]] for g in groups for k, (a, b) in pairs.items()
        }
        terms, free = [expression("(-{})", value.values[0]) for _, value in subtract], set(pairs)
        for name, value in add:
            side, k = (0, position[0]) if name == step.right else (1, position[1])
            operand = name in (step.left, step.right)
            if value.loaded and operand and k in free and len(groups) == 1:
                # left @ right + left = left @ (right + I): no float32 copy of left is needed.
                free.discard(k)
                products[k, (0, 0)][side] = self._shifted(pairs[k][side])
            else:
                terms.append(value.values[0])
        return self._tile(self.chain(products.values(), self.total(terms)))

    def _shifted(self, value: Tile) -> Expression:
        # The tile is strictly lower triangular: its diagonal is zero.
        shifted = expression("tl.where({}, 1.0, {})", DIAGONAL, value.operands[0])
        return self.source.once("{}.to({})", shifted, self.operand, kind=Kind.OPERAND)

    def add(self, step: Add, terms: Sequence[tuple[str, Tile]]) -> Tile:
        return self._tile(self.source.assign("{}", summed([value.values[0] for _, value in terms])))

    def rescale(self, step: Rescale, source: Tile) -> Tile:
        if step.factor == 1:
            return source
        return self._tile(self.source.assign("{} * {}", source.values[0], step.factor))

    def real(self, value: Tile) -> Expression:
        return value.values[0]

    def _tile(self, value: Expression) -> Tile:
        high = self.converted(value)
        if self.precision is not Precision.FP16X3:
            return Tile(values=(value,), operands=(high,))
        rest = expression("({} - {}.to(tl.float32))", value, high)
        low = self.source.assign("{}.to({})", rest, self.operand, kind=Kind.OPERAND)
        return Tile(values=(value,), operands=(high, low))
