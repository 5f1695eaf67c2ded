"""One program as a part of another: its tensors under new names, also for several blocks at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Final, TypeVar

from qinvert.program.step_list import StepList
from qinvert.program.steps import Constant, Range, Slice, Step

S = TypeVar("S", bound=Step)

#: Fields of steps that name one tensor, and those that name several.
NAMES: Final = ("output", "left", "right", "source", "vector", "constant")
LISTS: Final = ("add", "subtract", "sources")


def inlined(
    program: StepList, inputs: Mapping[str, str], prefix: str, copies: int = 1, max_beta: float = 1.0
) -> tuple[list[Step], list[Constant], dict[str, str]]:
    """Return the steps and constants of ``program`` with new names, and the tensor of every output port.

    Parameters
    ----------
    program : StepList
    inputs : mapping
        Tensor that takes the place of each input port.
    prefix : str
        What every other tensor and constant gets in front of its name.
    copies : int
        Number of blocks of each of these tensors for one of the program's: every
        step does for all of them what it does for one.
    max_beta : float
        By what the bounds of an inverse are multiplied: those of other programs hold no beta.

    Returns
    -------
    tuple
        Steps, constants, and the tensors of the outputs by the names of their ports.
    """
    tensors = {name: inputs.get(name, prefix + name) for name in program.tensors}
    constants = [replace(constant, name=prefix + constant.name) for constant in program.constants]
    names = tensors | {constant.name: prefix + constant.name for constant in program.constants}
    steps = [_bounded(_for_copies(renamed(s, names.__getitem__), copies), max_beta) for s in program.steps]
    return steps, constants, {port.name: names[port.tensor] for port in program.outputs}


def renamed(step: S, rename: Callable[[str], str]) -> S:
    """Return a step with other names of what it reads and writes."""
    changes: dict[str, object] = {}
    for field in fields(step):
        value = getattr(step, field.name)
        if field.name in NAMES:
            changes[field.name] = rename(value)
        elif field.name in LISTS:
            changes[field.name] = tuple(map(rename, value))
    return replace(step, **changes)  # type: ignore[arg-type] # names stay names


def _for_copies(step: Step, copies: int) -> Step:
    # The blocks of a program come first and the copies of each beside one another.
    if not isinstance(step, Slice) or step.blocks is None:
        return step
    return replace(step, blocks=_times(step.blocks, copies))


def _bounded(step: Step, max_beta: float) -> Step:
    return step if step.bound is None else replace(step, bound=step.bound * max_beta)


def _times(span: Range, copies: int) -> Range:
    return span[0] * copies, span[1] * copies
