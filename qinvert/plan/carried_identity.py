"""Which operands of a plan's products hold an identity in a graph, so that no product is widened.

``A B + B = (A + I) B``: a tensor with an empty diagonal and room for 1.0 on
its grid is stored once more with the identity added to it.  The lowering and
the cost of an operator list both ask here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

import numpy as np

from qinvert.numerics import scalar
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.sparsity import Support, cut, zero_diagonals
from qinvert.program.steps import Axis, Concat, MatMul, Slice


class CarriedIdentities:
    """What a graph of ``plan`` can store with an identity on the diagonal.

    Parameters
    ----------
    plan : QuantizedProgram
    returned : collection of str
        Tensors whose integers the graph returns, which must stay as the program has them.
    """

    def __init__(self, plan: QuantizedProgram, returned: Collection[str] = ()) -> None:
        self.plan, self.returned = plan, returned

    @cached_property
    def _hollow(self) -> set[str]:
        # Found when a residual term asks: the planner counts operators of many plans without one.
        exact = self.plan.requantize is Requantize.MULTIPLIER
        return zero_diagonals(self.plan.program) if exact else set()

    def carries(self, tensor: str) -> bool:
        """Whether the tensor can be stored with the identity added to it."""
        fits = tensor in self._hollow and one_of(self.plan.tensors[tensor]) > 0
        return fits and tensor not in self.returned

    def taken_by(self, step: MatMul) -> tuple[bool, bool]:
        """Return which operands take an identity: (left + I) right = left right + right."""
        terms = list(step.add)
        left = step.right in terms and self.carries(step.left)
        if left:
            terms.remove(step.right)
        right = step.left in terms and self.carries(step.right)
        # Both leave the product of the identities, which must be the result's.
        right = right and not (left and not self._yields_identity(step))
        # Where a Concat is needed all the same, an Add before it saves nothing.
        widened = left + right < len(step.add) + len(step.subtract)
        return (False, False) if widened else (left, right)

    def _yields_identity(self, step: MatMul) -> bool:
        if not self.carries(step.output):
            return False
        product, grid = self.plan.products[step.output], self.plan.tensors[step.output]
        one = one_of(self.plan.tensors[step.left])
        accumulators = [one * k for k in product.identity_planes()]
        found = scalar.requantize_partial_scalar(accumulators, product.factor, grid.scale, grid.format)
        return found == one_of(grid)


def one_of(grid: Quantization) -> int:
    """Return the integer of an operand that means 1.0 on a grid, 0 if there is none."""
    return grid.one if grid.one <= grid.largest_one else 0


def sliced_ones(step: Slice, ones: Support | None) -> Support | None:
    """Return where a slice is stored with ones, if its source is stored with ``ones``; None means nowhere."""
    kept = None if ones is None else cut(step, ones)
    return kept if kept is not None and kept.any() else None


def joined_ones(step: Concat, ones: Sequence[Support]) -> Support | None:
    """Return where a concat is stored with ones, if its sources are stored with ``ones``.

    None means that all sources must be stored without ones: blocks that have
    them at different places cannot be told apart any more.
    """
    if step.axis != Axis.BLOCKS:
        return np.concatenate(ones, axis=0 if step.axis == Axis.ROWS else 1)
    return ones[0] if all(np.array_equal(pattern, ones[0]) for pattern in ones) else None
