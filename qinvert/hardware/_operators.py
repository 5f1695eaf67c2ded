"""The operators that a plan becomes on a chip, as data from which a table of costs is summed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import numpy as np

from qinvert.plan.carried_identity import CarriedIdentities, joined_ones, sliced_ones
from qinvert.plan.far_sums import is_far
from qinvert.plan.quantization import Requantize
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.cost import inner_size
from qinvert.program.evaluator import Evaluator
from qinvert.program.sparsity import Support
from qinvert.program.steps import (
    Add,
    Concat,
    Constant,
    Exponential,
    Mask,
    MatMul,
    Multiply,
    Rescale,
    Scale,
    Slice,
    Step,
    Subtract,
    Transpose,
)


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

    #: Empty for a constant.
    tensor: str
    #: ``[rows, columns]`` of a block.
    shape: tuple[int, int]
    #: Where its integers are 1.0 more than the tensor's; None means nowhere.
    ones: Support | None = field(default=None, compare=False)


class OperatorCounter(Evaluator[_Stored]):
    """Lists the operators of a QDQ graph of ``plan`` for ``batch`` matrices.

    Parameters
    ----------
    plan : QuantizedProgram
    batch : int
        Matrices of one chain.
    returned : collection of str
        Tensors whose integers leave the graph as they are inside.
    """

    def __init__(self, plan: QuantizedProgram, batch: int, returned: Collection[str] = ()) -> None:
        self.plan, self.batch, self.returned = plan, batch, returned
        self.operators: list[Operator] = []
        self._identities = CarriedIdentities(plan, returned)
        self._results = {port.tensor for port in plan.program.outputs}
        self._shifted: set[tuple[str, bool]] = set()
        #: Right operands of products so far.
        self._rights: set[str] = set()

    def count(self) -> tuple[Operator, ...]:
        """Return the operators, in the order of the steps."""
        program = self.plan.program
        self.operators.clear()
        self._rights.clear()
        self._shifted.clear()
        results = program.evaluate(self, {port.name: self._stored(port.name) for port in program.inputs})
        for result in results.values():
            self._plain(result)
        return tuple(self.operators)

    def _stored(self, tensor: str, ones: Support | None = None) -> _Stored:
        _, rows, columns = self.plan.program.shapes[tensor]
        return _Stored(tensor=tensor, shape=(rows, columns), ones=ones)

    def constant(self, constant: Constant, blocks: int) -> _Stored:
        return _Stored(tensor="", shape=(constant.rows, constant.columns))

    def matmul(
        self, step: MatMul, left: _Stored, right: _Stored, add: list[_Stored], subtract: list[_Stored]
    ) -> _Stored:
        if self.plan.requantize is Requantize.DIVIDE:
            self._products(step, 1)
            for term in (*add, *subtract):
                self._elementwise(term.tensor)
            return self._stored(step.output)
        shifts = self._identities.taken_by(step)
        for operand, shift in zip((left, right), shifts, strict=True):
            self._plus_identity(operand) if shift else self._plain(operand)
        widened = 0 if any(shifts) else len(add) + len(subtract)
        if widened:
            self._move(step.left, 1 + widened)
            self._move(step.right, 1 + widened)
        self._products(step, 1 + widened)
        size = self.plan.program.shapes[step.output].columns
        return self._stored(step.output, np.eye(size, dtype=np.bool_) if all(shifts) else None)

    def _products(self, step: MatMul, depth: int) -> None:
        product = self.plan.products[step.output]
        inner = inner_size(self.plan.program, step)
        if product.right.format.is_split:
            # The high plane, the same on the grid of both, what it leaves, and that as the low plane.
            for _ in range(4):
                self._elementwise(step.right, depth)
        count = sum(len(accumulator.pairs) for accumulator in product.accumulators)
        width = product.left.format.container_bits // 8
        wide = width * (2 if product.right.format.whole else 1)
        # Constants are arranged when a graph is compiled.
        right = step.right if step.right in self.plan.tensors else ""
        for _ in range(count):
            self._product(step.output, inner * depth, wide, right)
        for _ in range(count - 1):
            self._elementwise(step.output)

    def _plain(self, value: _Stored) -> None:
        """Count the difference by which a tensor loses its ones, once for each."""
        if value.ones is not None:
            self._shift(value, wanted=False)

    def _plus_identity(self, value: _Stored) -> None:
        """Count the sum by which a tensor gets the identity, once for each."""
        if value.ones is None or not np.array_equal(value.ones, np.eye(len(value.ones))):
            self._plain(value)
            self._shift(value, wanted=True)

    def _shift(self, value: _Stored, wanted: bool) -> None:
        if (value.tensor, wanted) not in self._shifted:
            self._shifted.add((value.tensor, wanted))
            self._elementwise(value.tensor)

    def add(self, step: Add, left: _Stored, right: _Stored) -> _Stored:
        for value in (left, right):
            self._plain(value)
        return self._sum(step)

    def subtract(self, step: Subtract, left: _Stored, right: _Stored) -> _Stored:
        for value in (left, right):
            self._plain(value)
        return self._sum(step)

    def multiply(self, step: Multiply, left: _Stored, right: _Stored) -> _Stored:
        return self._written(step, left, right)

    def exponential(self, step: Exponential, source: _Stored) -> _Stored:
        return self._written(step, source)

    def transpose(self, step: Transpose, source: _Stored) -> _Stored:
        self._plain(source)
        self._move(step.output)
        return self._stored(step.output)

    def _written(self, step: Step, *sources: _Stored) -> _Stored:
        """Count one elementwise operator."""
        for source in sources:
            self._plain(source)
        self._elementwise(step.output)
        return self._stored(step.output)

    def _sum(self, step: Add | Subtract | Rescale) -> _Stored:
        if is_far(step, self.plan.tensors):
            # Graphs multiply the first operand by an identity.
            self._product(step.output, self.plan.program.shapes[step.output].columns)
        self._elementwise(step.output)
        return self._stored(step.output)

    def rescale(self, step: Rescale, source: _Stored) -> _Stored:
        unnamed = step.output not in self._results or self.plan.tensors[step.output].format.planes > 1
        if self.plan.keeps_integers(step) and unnamed:
            return self._stored(step.output, source.ones)
        self._plain(source)
        return self._sum(step)

    def scale(self, step: Scale, source: _Stored, vector: _Stored) -> _Stored:
        return self._written(step, source)

    def mask(self, step: Mask, source: _Stored, constant: _Stored) -> _Stored:
        return self._written(step, source)

    def slice(self, step: Slice, source: _Stored) -> _Stored:
        ones = self._movable(step, [source])
        self._move(step.output)
        return self._stored(step.output, sliced_ones(step, source.ones) if ones else None)

    def concat(self, step: Concat, sources: list[_Stored]) -> _Stored:
        ones = None
        if self._movable(step, sources):
            given = [np.zeros(v.shape, np.bool_) if v.ones is None else v.ones for v in sources]
            ones = joined_ones(step, given)
            if ones is None:
                for value in sources:
                    self._plain(value)
        self._move(step.output)
        return self._stored(step.output, ones)

    def _movable(self, step: Concat | Slice, sources: list[_Stored]) -> bool:
        """Whether a step moves ones; integers that the graph returns must be those of the program."""
        if step.output in self.returned:
            for value in sources:
                self._plain(value)
            return False
        return any(value.ones is not None for value in sources)

    def _product(self, tensor: str, inner: int, wide: int = 1, right: str = "") -> None:
        macs = self.batch * math.prod(self.plan.program.shapes[tensor]) * inner * wide
        self._append(Kind.PRODUCT, tensor, macs=macs, right=right)

    def _elementwise(self, tensor: str, times: int = 1) -> None:
        self._append(Kind.ELEMENTWISE, tensor, times=times)

    def _move(self, tensor: str, times: int = 1) -> None:
        self._append(Kind.MOVE, tensor, times=times)

    def move_ends(self, tensors: Sequence[str]) -> tuple[Operator, ...]:
        """Return the operators that cut whole batches into chains, or join them."""
        self.operators.clear()
        for tensor in tensors:
            self._move(tensor)
        return tuple(self.operators)

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
        elements = self.batch * math.prod(self.plan.program.shapes[tensor])
        return elements * self.plan.tensors[tensor].format.bytes


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
    program = plan.program
    results = [port.tensor for port in program.outputs]
    if chains == 1:
        # Targets of whole 16 bits have other integers at the ends of graphs.
        returned = {tensor for tensor in results if not plan.tensors[tensor].format.whole}
        return list(OperatorCounter(plan, batch, returned).count())
    counter = OperatorCounter(plan, batch // chains)
    each = counter.count()
    # A vector is cut once along each axis that it multiplies.
    vectors = dict.fromkeys((step.vector, step.axis) for step in program.steps if isinstance(step, Scale))
    matrices = [port.name for port in program.inputs if port.name not in program.vector_inputs]
    cuts = counter.move_ends([*matrices, *(vector for vector, _ in vectors)] * chains)
    joins = OperatorCounter(plan, batch).move_ends(results)
    return [*cuts, *(each * chains), *joins]


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
