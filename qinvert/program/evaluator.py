"""The protocol of interpreters: what every kind of step means for one type of value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Generic, TypeVar

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

V = TypeVar("V")


class Evaluator(ABC, Generic[V]):
    """One meaning of a program: a value type ``V`` and one method per kind of step.

    Laws: methods are pure, and ``mask``, ``transpose``, ``slice`` and ``concat``
    return values of their sources unchanged.  ``matmul`` rounds at most once, except for int16
    products that are requantized by one factor: these round the accumulator of
    each plane, and then their sum.
    """

    @abstractmethod
    def constant(self, constant: Constant, blocks: int) -> V:
        """Return the constant, repeated for ``blocks`` blocks."""

    @abstractmethod
    def matmul(self, step: MatMul, left: V, right: V, add: list[V], subtract: list[V]) -> V:
        """Return ``left @ right + sum(add) - sum(subtract)``."""

    @abstractmethod
    def add(self, step: Add, left: V, right: V) -> V:
        """Return ``left + right``."""

    @abstractmethod
    def subtract(self, step: Subtract, left: V, right: V) -> V:
        """Return ``left - right``."""

    @abstractmethod
    def multiply(self, step: Multiply, left: V, right: V) -> V:
        """Return ``left * right``, elementwise."""

    @abstractmethod
    def exponential(self, step: Exponential, source: V) -> V:
        """Return ``exp(source)``."""

    @abstractmethod
    def rescale(self, step: Rescale, source: V) -> V:
        """Return ``step.factor * source`` on the output's scale."""

    @abstractmethod
    def scale(self, step: Scale, source: V, vector: V) -> V:
        """Return ``source`` with its rows or columns multiplied by ``vector``."""

    @abstractmethod
    def mask(self, step: Mask, source: V, constant: V) -> V:
        """Return ``source * constant``."""

    @abstractmethod
    def transpose(self, step: Transpose, source: V) -> V:
        """Return the transposed blocks of ``source``."""

    @abstractmethod
    def slice(self, step: Slice, source: V) -> V:
        """Return the sub-blocks that ``step`` names."""

    @abstractmethod
    def concat(self, step: Concat, sources: list[V]) -> V:
        """Return ``sources`` joined along ``step.axis``."""


def apply_step(evaluator: Evaluator[V], step: Step, values: Mapping[str, V]) -> V:
    """Return the result of one step under ``evaluator``; ``values`` holds its inputs."""
    match step:
        case MatMul():
            add = [values[name] for name in step.add]
            subtract = [values[name] for name in step.subtract]
            return evaluator.matmul(step, values[step.left], values[step.right], add, subtract)
        case Add():
            return evaluator.add(step, values[step.left], values[step.right])
        case Subtract():
            return evaluator.subtract(step, values[step.left], values[step.right])
        case Multiply():
            return evaluator.multiply(step, values[step.left], values[step.right])
        case Exponential():
            return evaluator.exponential(step, values[step.source])
        case Rescale():
            return evaluator.rescale(step, values[step.source])
        case Scale():
            return evaluator.scale(step, values[step.source], values[step.vector])
        case Mask():
            return evaluator.mask(step, values[step.source], values[step.constant])
        case Transpose():
            return evaluator.transpose(step, values[step.source])
        case Slice():
            return evaluator.slice(step, values[step.source])
        case Concat():
            return evaluator.concat(step, [values[name] for name in step.sources])
