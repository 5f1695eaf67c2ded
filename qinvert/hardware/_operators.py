"""The operators that a plan becomes on a chip, as data from which a table of costs is summed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from qinvert.formats import IntFormat
from qinvert.plan.carried_identity import CarriedIdentities
from qinvert.plan.quantization import Requantize
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.evaluator import Evaluator
from qinvert.program.steps import Add, Concat, Constant, Mask, MatMul, Rescale, Scale, Slice


class Kind(StrEnum):
    """What costs alike on a chip."""

    #: A matrix product of integers.
    PRODUCT = "product"
    #: Add, Sub, Mul, and requantizing alone.
    ELEMENTWISE = "elementwise"
    #: Slice and Concat.
    MOVE = "move"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One operator of a graph, for the whole batch of its chain."""

    kind: Kind
    #: Matrices that it writes.
    matrices: int
    #: Bytes that it writes.
    written: int
    #: Matrices of a right operand that no product before had: chips arrange such an operand for the
    #: unit that multiplies.
    new_right: int = 0
    #: Bytes of them.
    arranged: int = 0
    #: Multiply-accumulates, each as many times as an operand has bytes beyond the first.
    macs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A tensor of the program as a graph holds it."""

    tensor: str
    #: Whether its integers have the identity on their diagonal.
    ones: bool = False


class OperatorCounter(Evaluator[_Stored]):
    """Lists the operators of a QDQ graph of ``plan`` for ``batch`` matrices.

    Parameters
    ----------
    plan : QuantizedProgram
    batch : int
        Matrices of one chain.
    """

    def __init__(self, plan: QuantizedProgram, batch: int) -> None:
        self.plan, self.batch = plan, batch
        self.operators: list[Operator] = []
        self._identities = CarriedIdentities(plan, {port.tensor for port in plan.program.outputs})
        self._shifted: set[tuple[str, bool]] = set()
        #: Right operands of products so far.
        self._rights: set[str] = set()

    def count(self) -> Sequence[Operator]:
        """Return the operators, in the order of the steps."""
        program = self.plan.program
        self.operators.clear()
        self._rights.clear()
        self._shifted.clear()
        program.evaluate(self, {port.name: _Stored(tensor=port.name) for port in program.inputs})
        return tuple(self.operators)

    def constant(self, constant: Constant, blocks: int) -> _Stored:
        return _Stored(tensor=constant.name)

    def matmul(
        self, step: MatMul, left: _Stored, right: _Stored, add: list[_Stored], subtract: list[_Stored]
    ) -> _Stored:
        if self.plan.requantize is Requantize.DIVIDE:
            self._products(step, 1)
            for term in (*add, *subtract):
                self._elementwise(term.tensor)
            return _Stored(tensor=step.output)
        shifts = self._identities.taken_by(step)
        for operand, shift in zip((left, right), shifts, strict=True):
            self._wants_ones(operand, shift)
        widened = 0 if any(shifts) else len(add) + len(subtract)
        if widened:
            self._move(step.left, 1 + widened)
            self._move(step.right, 1 + widened)
        self._products(step, 1 + widened)
        return _Stored(tensor=step.output, ones=all(shifts))

    def _products(self, step: MatMul, depth: int) -> None:
        product = self.plan.products[step.output]
        shape, inner = self.plan.program.shapes[step.output], self.plan.program.shapes[step.left].columns
        if product.right.format.is_split:
            # The right operand becomes two planes: two roundings, the difference, and its two roundings.
            for _ in range(5):
                self._elementwise(step.right)
        count = sum(len(accumulator.pairs) for accumulator in product.accumulators)
        width = product.left.format.container_bits // 8
        wide = width * (2 if product.right.format.whole else 1)
        for _ in range(count):
            macs = self.batch * math.prod(shape) * inner * depth * wide
            self._append(Kind.PRODUCT, step.output, macs, right=step.right)
        for _ in range(count - 1):
            self._elementwise(step.output)

    def _wants_ones(self, value: _Stored, wanted: bool) -> None:
        """Count the sum by which a tensor gets or loses its identity, once for each."""
        if value.ones != wanted and (value.tensor, wanted) not in self._shifted:
            self._shifted.add((value.tensor, wanted))
            self._elementwise(value.tensor)

    def add(self, step: Add, left: _Stored, right: _Stored) -> _Stored:
        for value in (left, right):
            self._wants_ones(value, wanted=False)
        self._elementwise(step.output)
        return _Stored(tensor=step.output)

    def rescale(self, step: Rescale, source: _Stored) -> _Stored:
        if not self.plan.keeps_integers(step):
            self._wants_ones(source, wanted=False)
            self._elementwise(step.output)
            return _Stored(tensor=step.output)
        return _Stored(tensor=step.output, ones=source.ones)

    def scale(self, step: Scale, source: _Stored, vector: _Stored) -> _Stored:
        self._wants_ones(source, wanted=False)
        self._elementwise(step.output)
        return _Stored(tensor=step.output)

    def mask(self, step: Mask, source: _Stored, constant: _Stored) -> _Stored:
        self._wants_ones(source, wanted=False)
        self._elementwise(step.output)
        return _Stored(tensor=step.output)

    def slice(self, step: Slice, source: _Stored) -> _Stored:
        self._move(step.output)
        # The identity is on the diagonal alone.
        return _Stored(tensor=step.output, ones=source.ones and step.rows == step.columns)

    def concat(self, step: Concat, sources: list[_Stored]) -> _Stored:
        self._move(step.output)
        return _Stored(tensor=step.output, ones=any(value.ones for value in sources))

    def _elementwise(self, tensor: str) -> None:
        self._append(Kind.ELEMENTWISE, tensor)

    def _move(self, tensor: str, times: int = 1) -> None:
        self._append(Kind.MOVE, tensor, times=times)

    def _append(self, kind: Kind, tensor: str, macs: int = 0, times: int = 1, right: str = "") -> None:
        new = right if right not in self._rights else ""
        self._rights.add(right)
        operator = Operator(
            kind=kind,
            matrices=self._matrices(tensor),
            written=times * self._size(tensor),
            new_right=self._matrices(new) if new else 0,
            arranged=self._size(new) if new else 0,
            macs=macs,
        )
        self.operators.append(operator)

    def _matrices(self, tensor: str) -> int:
        return self.plan.program.shapes[tensor].blocks * self.batch

    def _size(self, tensor: str) -> int:
        return (
            self.batch
            * math.prod(self.plan.program.shapes[tensor])
            * _bytes(self.plan.tensors[tensor].format)
        )


def _bytes(fmt: IntFormat) -> int:
    return fmt.planes * fmt.container_bits // 8


def operators(plan: QuantizedProgram, batch: int, chains: int = 1) -> list[Operator]:
    """Return the operators of a graph of ``plan`` between integer ends.

    Parameters
    ----------
    plan : QuantizedProgram
    batch : int
        Matrices per call.
    chains : int
        Independent parts of the batch, which divide it.
    """
    each = OperatorCounter(plan, batch // chains).count()
    if chains == 1:
        return list(each)
    ends = OperatorCounter(plan, batch // chains)
    for port in (*plan.program.inputs,) * chains:
        ends._move(port.name)
    whole = OperatorCounter(plan, batch)
    for port in plan.program.outputs:
        whole._move(port.tensor)
    return [*ends.operators, *(operator for _ in range(chains) for operator in each), *whole.operators]


#: Names of what `features` returns.
FEATURES: Final = (
    *(f"{kind}{each}" for kind in Kind for each in ("", "/matrix", "/KiB")),
    "product/Mmac",
    "new right/matrix",
    "new right/KiB",
)


def features(found: Sequence[Operator]) -> Mapping[str, float]:
    """Return what a table of costs weighs: counts, matrices, KiB written and million multiply-accumulates."""
    sums: dict[str, float] = {}
    for kind in Kind:
        mine = [operator for operator in found if operator.kind is kind]
        sums[kind] = len(mine)
        sums[f"{kind}/matrix"] = sum(operator.matrices for operator in mine)
        sums[f"{kind}/KiB"] = sum(operator.written for operator in mine) / 1024
    sums["product/Mmac"] = sum(operator.macs for operator in found) / 1e6
    sums["new right/matrix"] = sum(operator.new_right for operator in found)
    sums["new right/KiB"] = sum(operator.arranged for operator in found) / 1024
    return sums
