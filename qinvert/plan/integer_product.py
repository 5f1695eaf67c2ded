"""What a product means in integers, as data that all interpreters share.

A step ``left @ right + residuals`` becomes accumulators of int8 products.  An
elementwise product (`Scale`, `Multiply`) is the same with one product in each
sum, and its right operand stays whole: graphs multiply 16 by 16 bits there.
This module decides which planes meet in which accumulator, the real value of
one step of an accumulator, how residual terms join, and how the accumulators
become integers again.  The simulator, the
intervals, kernels, lowering, cost and the planner's noise model all use it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, TypeAlias

from qinvert.errors import PlanError
from qinvert.formats import IntFormat
from qinvert.numerics.accumulators import (
    accumulator_limit,
    operand_magnitudes,
    partial_factors,
    partial_products,
    plane_scales,
)
from qinvert.numerics.scalar import operand_planes_scalar, planes_scalar
from qinvert.numerics.scales import multiplier, product_scale
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.steps import MatMul, Multiply, Scale

#: Steps that multiply two tensors.
Product: TypeAlias = MatMul | Scale | Multiply
#: The same for `isinstance`.
PRODUCTS: Final = (MatMul, Scale, Multiply)


class PlanePair(NamedTuple):
    """A plane of the left operand, and the plane of the right one that it meets; 0 is the highest."""

    left: int
    right: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanePairs:
    """The products of planes of two operands."""

    #: Pairs of equal weight share an accumulator; the heaviest come first.
    groups: tuple[tuple[PlanePair, ...], ...]
    #: Whether the product of the low planes of both operands is left out.  It stays below one step
    #: of a 16-bit result.
    drops_low: bool

    def rounded_apart(self, requantize: Requantize) -> bool:
        """Whether each accumulator is rounded for itself, and not the sum of all of them."""
        return requantize is Requantize.MULTIPLIER and len(self.groups) > 1


def plane_pairs(left: IntFormat, right: IntFormat, *, splits_right: bool = True) -> PlanePairs:
    """Return the products of planes of a left and a right operand of these formats."""
    counts = len(operand_magnitudes(left, right=False)), len(operand_magnitudes(right, splits_right))
    groups = tuple(tuple(PlanePair(*pair) for pair in group) for group in partial_products(*counts))
    return PlanePairs(groups=groups, drops_low=sum(map(len, groups)) < counts[0] * counts[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """A term that joins an accumulator as an exact integer."""

    #: Tensor that is added.
    tensor: str
    #: Its plane as a right operand; None for the integers as they are stored.
    plane: int | None
    #: Number of accumulator steps in one step of the tensor; negative if it is subtracted.
    factor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulator:
    """One int32 sum of products of planes, residual terms included."""

    #: Products that it sums.
    pairs: tuple[PlanePair, ...]
    #: Real value of one step.
    unit: float
    #: Terms that join it as integers; there are none if the plan divides.
    residuals: tuple[Residual, ...]
    #: Largest magnitude, from formats and shapes only.
    bound: int


class IdentityParts(NamedTuple):
    """1.0 as ``full`` times the largest integer of an operand, and the rest."""

    largest: int
    full: int
    rest: int

    @property
    def number(self) -> int:
        """Number of blocks that are not zero."""
        return self.full + (self.rest > 0)

    @property
    def blocks(self) -> list[int]:
        """The integers, one for each block."""
        return [self.largest] * self.full + [self.rest] * (self.rest > 0)


class Addend(NamedTuple):
    """A plane of a residual term, which joins as a float32 product if the plan divides."""

    tensor: str
    plane: int
    #: Real value of one step; negative if it is subtracted.
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerProduct:
    """A product of a plan, as every interpreter of integers reads it.

    With `Requantize.MULTIPLIER` each accumulator, its residuals included, is
    multiplied by its own factor of `factors` and rounded; the results are added.
    With `Requantize.DIVIDE` the accumulators times their units and the
    `addends` are summed in float32, from left to right, and divided by the
    output's scale.
    """

    step: Product
    left: Quantization
    right: Quantization
    output: Quantization
    requantize: Requantize
    #: The heaviest come first.
    accumulators: tuple[Accumulator, ...]
    #: In the order in which they are added; empty with `Requantize.MULTIPLIER`.
    addends: tuple[Addend, ...]

    @property
    def factor(self) -> float:
        """``float32(float32(sa sb) / sy)``: from the lightest accumulator to integers of the output.

        Raises
        ------
        PlanError
            If it overflows.
        """
        return multiplier(self.left.scale, self.right.scale, self.output.scale)

    @property
    def factors(self) -> list[float]:
        """`factor` of every accumulator."""
        return partial_factors(self.factor, len(self.accumulators))

    @property
    def bound(self) -> int:
        """Largest magnitude that any of the accumulators can reach."""
        return max(accumulator.bound for accumulator in self.accumulators)

    @property
    def splits_right(self) -> bool:
        """Whether a right operand of more than 8 bits enters as two int8 planes: in sums of products only."""
        return isinstance(self.step, MatMul)

    @property
    def _magnitudes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Largest magnitude of every plane of the left and of the right operand."""
        left = operand_magnitudes(self.left.format, right=False)
        return left, operand_magnitudes(self.right.format, self.splits_right)

    @property
    def magnitude(self) -> int:
        """Largest magnitude of a plane of an operand."""
        return max(map(max, self._magnitudes))

    @property
    def limit(self) -> int:
        """What its accumulators must stay below: an operand of at most 8 bits leaves them int32."""
        return accumulator_limit(min(map(max, self._magnitudes)))

    @property
    def cost(self) -> int:
        """Number of int8 products that cost as much: three for int8x2, four for int16."""
        count = sum(len(accumulator.pairs) for accumulator in self.accumulators)
        return count * self.left.format.container_bits // 8

    def identity(self, term: str) -> int:
        """Integer that means 1.0 on the grid of the operand that multiplies the residual ``term``.

        ``left @ right + right = (left + I) @ right``: on left's grid the
        identity is the integer ``k`` with ``float32(1 / k) = scale(left)``, so
        the term enters the accumulator as ``k q``, exactly.

        Raises
        ------
        PlanError
            If the term is not an operand, or if the other operand's scale is
            not a float32 reciprocal of an integer.
        """
        partner, grid = self._partner(term)
        if not grid.one:
            raise PlanError(
                f"step {self.step.output!r}: 1.0 is not an integer on the grid of {partner!r} "
                f"(scale {grid.scale!r}); use a scale 1/k or requantize='divide'"
            )
        return grid.one

    def identity_parts(self, term: str) -> IdentityParts:
        """Integers that one operand can hold and that add up to `identity`; nothing is allocated for them."""
        _, grid = self._partner(term)
        full, rest = divmod(self.identity(term), grid.largest_one)
        return IdentityParts(grid.largest_one, full, rest)

    def identity_planes(self) -> list[int]:
        """Integers that mean 1.0 on the planes of the right operand: factors of a residual left operand."""
        left, _ = operands(self.step)
        largest, full, rest = self.identity_parts(left)
        # All full blocks split alike, and a scale of any plan from outside may mean 1e28 of them.
        whole, part = (
            [q for q, _ in operand_planes_scalar(block, self.right.scale, self.right.format)]
            for block in (largest, rest)
        )
        return [full * q + r for q, r in zip(whole, part, strict=True)]

    def _partner(self, term: str) -> tuple[str, Quantization]:
        left, right = operands(self.step)
        if term not in (left, right):
            raise PlanError(
                f"step {self.step.output!r}: residual {term!r} is not an operand of the product; "
                "plan it with requantize='divide'"
            )
        return (left, self.left) if term == right else (right, self.right)


def integer_product(
    step: Product, grids: Mapping[str, Quantization], requantize: Requantize, depth: int
) -> IntegerProduct:
    """Return what a product means under the grids of its tensors.

    Parameters
    ----------
    step : MatMul, Scale or Multiply
        The right operand of a `Scale` is its vector.
    grids : mapping
        Quantization of every tensor and constant that the step names.
    requantize : Requantize
    depth : int
        Number of products in one element's sum: columns of the left operand of a MatMul, else 1.

    Raises
    ------
    PlanError
        If a residual term is not an exact integer of its accumulator, where
        the plan requantizes by one factor.
    """
    left, right = (grids[name] for name in operands(step))
    bare = IntegerProduct(
        step=step,
        left=left,
        right=right,
        output=grids[step.output],
        requantize=requantize,
        accumulators=(),
        addends=(),
    )
    terms = _signed_terms(step)
    exact = requantize is Requantize.MULTIPLIER
    residuals = _residuals(bare, terms) if exact else {}
    groups = plane_pairs(left.format, right.format, splits_right=bare.splits_right).groups
    return replace(
        bare,
        accumulators=tuple(
            _accumulator(bare, pairs, depth, residuals.get(i, ()), grids) for i, pairs in enumerate(groups)
        ),
        addends=() if exact else tuple(_addends(terms, grids)),
    )


def operands(step: Product) -> tuple[str, str]:
    """Return the names of what a product multiplies."""
    return (step.source, step.vector) if isinstance(step, Scale) else (step.left, step.right)


def _signed_terms(step: Product) -> list[tuple[int, str]]:
    if not isinstance(step, MatMul):
        return []
    return [*((1, name) for name in step.add), *((-1, name) for name in step.subtract)]


def _residuals(product: IntegerProduct, terms: list[tuple[int, str]]) -> dict[int, tuple[Residual, ...]]:
    """Residual terms by the number of the accumulator that they join."""
    _, right = operands(product.step)
    count = len(operand_magnitudes(product.right.format, right=True))
    found: dict[int, tuple[Residual, ...]] = {}
    for sign, name in terms:
        factors = [product.identity(name)] * count if name == right else _left_factors(product, name)
        for i, factor in enumerate(factors):
            plane = i if name == right and count > 1 else None
            found[i] = (*found.get(i, ()), Residual(tensor=name, plane=plane, factor=sign * factor))
    return found


def _left_factors(product: IntegerProduct, name: str) -> list[int]:
    # This refuses a term that is not an operand, with its name, before anything is split.
    product.identity(name)
    return product.identity_planes()


def _accumulator(
    product: IntegerProduct,
    pairs: tuple[PlanePair, ...],
    depth: int,
    residuals: tuple[Residual, ...],
    grids: Mapping[str, Quantization],
) -> Accumulator:
    left, right, split = product.left, product.right, product.splits_right
    lefts, rights = operand_magnitudes(left.format, right=False), operand_magnitudes(right.format, split)
    units = (
        plane_scales(left.format, left.scale, right=False),
        plane_scales(right.format, right.scale, split),
    )
    bound = sum(depth * lefts[pair.left] * rights[pair.right] for pair in pairs)
    bound += sum(abs(term.factor) * _reach(term, grids[term.tensor].format) for term in residuals)
    unit = product_scale(units[0][pairs[0].left], units[1][pairs[0].right])
    return Accumulator(pairs=pairs, unit=unit, residuals=residuals, bound=bound)


def _reach(term: Residual, fmt: IntFormat) -> int:
    """Largest magnitude of the integers that the factor of the term multiplies."""
    return fmt.magnitude if term.plane is None else operand_magnitudes(fmt, right=True)[term.plane]


def _addends(terms: list[tuple[int, str]], grids: Mapping[str, Quantization]) -> Iterator[Addend]:
    for sign, name in terms:
        grid = grids[name]
        for plane, (_, scale) in enumerate(planes_scalar(0, grid.scale, grid.format)):
            yield Addend(name, plane, sign * scale)
