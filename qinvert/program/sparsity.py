"""Where the tensors of a program may differ from zero, whatever L is.

A graph stores ``A + I`` where A is strictly lower triangular, so that ``A B +
B = (A + I) B`` needs no separate term; a kernel neither reads nor computes
what is known to be zero.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from qinvert.program.evaluator import Evaluator
from qinvert.program.ports import Port
from qinvert.program.step_list import StepList
from qinvert.program.steps import (
    Add,
    Axis,
    Concat,
    Constant,
    Exponential,
    Mask,
    MatMul,
    Multiply,
    Rescale,
    Scale,
    Slice,
    Subtract,
    Transpose,
)

#: Where a tensor may differ from zero, ``[rows, columns]``, the same for all of its blocks.
Support = npt.NDArray[np.bool_]


@lru_cache(maxsize=256)
def constant_support(constant: Constant) -> Support:
    """Return the ones of a constant, ``[rows, columns]``; callers must not write to them."""
    columns = np.arange(constant.columns)
    starts, stops = np.array(constant.ones).T[..., None]
    support: Support = (columns >= starts) & (columns < stops)
    return support


def product_support(left: Support, right: Support) -> Support:
    """Return where ``left @ right`` may differ from zero."""
    # This runs in float32, because products of booleans are slow.
    product: Support = left.astype(np.float32) @ right.astype(np.float32) > 0
    return product


def cut(step: Slice, pattern: Support) -> Support:
    """Return the part of a block that a slice keeps."""
    part: Support = pattern[slice(*step.rows or (None,)), slice(*step.columns or (None,))]
    return part


class SupportEvaluator(Evaluator[Support]):
    """Meaning of the steps on supports; a result may be larger than necessary, but never smaller."""

    def constant(self, constant: Constant, blocks: int) -> Support:
        return constant_support(constant)

    def matmul(
        self, step: MatMul, left: Support, right: Support, add: list[Support], subtract: list[Support]
    ) -> Support:
        return _union([product_support(left, right), *add, *subtract])

    def add(self, step: Add, left: Support, right: Support) -> Support:
        return left | right

    def subtract(self, step: Subtract, left: Support, right: Support) -> Support:
        return left | right

    def multiply(self, step: Multiply, left: Support, right: Support) -> Support:
        return left & right

    def exponential(self, step: Exponential, source: Support) -> Support:
        return np.ones_like(source)

    def rescale(self, step: Rescale, source: Support) -> Support:
        return source

    def scale(self, step: Scale, source: Support, vector: Support) -> Support:
        return source

    def mask(self, step: Mask, source: Support, constant: Support) -> Support:
        return source & constant

    def transpose(self, step: Transpose, source: Support) -> Support:
        return source.T

    def slice(self, step: Slice, source: Support) -> Support:
        return cut(step, source)

    def concat(self, step: Concat, sources: list[Support]) -> Support:
        if step.axis == Axis.BLOCKS:
            return _union(sources)
        return np.concatenate(sources, axis=0 if step.axis == Axis.ROWS else 1)


def _union(supports: list[Support]) -> Support:
    union: Support = np.logical_or.reduce(supports)
    return union


def port_support(port: Port) -> Support:
    """Return where an input may differ from zero, whatever the data are."""
    _, rows, columns = port.shape
    return (
        np.tri(rows, columns, -1, np.bool_)
        if port.meaning.strictly_lower
        else np.ones((rows, columns), np.bool_)
    )


def zero_diagonals(program: StepList) -> set[str]:
    """Return the tensors whose blocks are square and zero on the diagonal, for any data."""
    found = set()

    def observe(name: str, support: Support) -> None:
        if support.shape[0] == support.shape[1] and not np.diagonal(support).any():
            found.add(name)

    program.evaluate(SupportEvaluator(), {port.name: port_support(port) for port in program.inputs}, observe)
    return found
