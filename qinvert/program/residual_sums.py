"""Residual terms of products as sums of their own, where those cost less than a wider product."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Final, TypeVar

from qinvert.program.step_list import StepList
from qinvert.program.steps import Add, MatMul, Step

P = TypeVar("P", bound=StepList)

#: Parameter in the title of a program whose residual terms are sums.
PARAMETER: Final = "residuals"
SUMS: Final = "sums"
#: What the name of such a product ends with, after the name of the step that it was part of.
PRODUCT: Final = "/product"
#: ``max|input| <= max(beta)``: what a residual term that is an input adds to a proved range.
INPUT_BOUND: Final = 1.0


def residuals_as_sums(program: P) -> P:
    """``P = A B``, then ``output = P + sum(add)``, for every product with residual terms that are added.

    The result is the same program in exact arithmetic.  In integers a product
    is rounded before its terms join it, and every sum is rounded once more,
    unless all of its tensors share one grid: then it is an exact sum of
    integers, and the one rounding is that of the product.  A product that also
    subtracts stays as it is: what is left of a cancellation needs a finer grid
    than its terms.

    Proved ranges follow from those of the step:
    ``|P| <= |output| + sum |add|``.  The product and the sums of a partial step
    are partial.  On one grid a product that saturates makes its sum wrong in
    the same place and in no other.

    Parameters
    ----------
    program : StepList

    Returns
    -------
    StepList
        Of the same type, with the parameter ``residuals=sums``, or ``program`` itself where it has
        no such product.
    """
    bounds: dict[str, float | None] = {port.name: INPUT_BOUND for port in program.inputs}
    bounds |= {step.output: step.bound for step in program.steps}
    steps = tuple(part for step in program.steps for part in _split(step, bounds))
    if steps == program.steps:
        return program
    return replace(program, steps=steps, parameters={**program.parameters, PARAMETER: SUMS})


def has_sums(program: StepList) -> bool:
    """Whether a program comes from `residuals_as_sums`."""
    return program.parameters.get(PARAMETER) == SUMS


def residual_sums(program: StepList) -> list[Add]:
    """Return the sums that `residuals_as_sums` made of residual terms."""
    if not has_sums(program):
        return []
    readers = Counter(name for step in program.steps for name in step.inputs)
    # By their names, because a program may also have sums of products of its own.
    partial = {s.output for s in program.steps if isinstance(s, MatMul) and s.output.endswith(PRODUCT)}
    found = []
    for step in program.steps:
        if isinstance(step, Add) and step.left in partial and readers[step.left] == 1:
            partial.add(step.output)
            found.append(step)
    return found


def _split(step: Step, bounds: dict[str, float | None]) -> Iterator[Step]:
    if not isinstance(step, MatMul) or not step.add or step.subtract:
        yield step
        return
    product = step.output + PRODUCT
    bound = _sum_of([step.bound, *(bounds[term] for term in step.add)])
    yield MatMul(output=product, left=step.left, right=step.right, bound=bound, partial=step.partial)
    total = product
    for i, term in enumerate(step.add, start=1):
        last = i == len(step.add)
        name = step.output if last else f"{step.output}/sum_{i}"
        bound = step.bound if last else _sum_of([step.bound, *(bounds[rest] for rest in step.add[i:])])
        yield Add(output=name, left=total, right=term, bound=bound, partial=step.partial)
        total = name


def _sum_of(bounds: list[float | None]) -> float | None:
    known = [bound for bound in bounds if bound is not None]
    return sum(known) if len(known) == len(bounds) else None
