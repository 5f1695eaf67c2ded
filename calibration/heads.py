"""Grids per head: every head of a layer becomes a layer of the plan.

A plan with granularity "head" has entries ``LAYER/head_0``, ``LAYER/head_1``
and so on.  Each has its own program, formats and scales.  An inverse is exported as
its own graph, because compilers take only one scale per tensor; heads of a
chunk step run side by side in the graph of their layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

import torch

from qinvert.calibration.head_names import head_name, is_split
from qinvert.errors import InputError, PlanError
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.systems import HEAD_AXIS, Systems

#: ``inverse(name, systems) -> T`` for an entry of a plan.
EntryInverse: TypeAlias = Callable[[str, Systems], torch.Tensor]

#: Head of matrices that have no axis of heads.
NO_HEAD: Final = -1


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Key that sorts names with their numbers as numbers, ``layers.2`` before ``layers.10``."""
    parts = re.split(r"(\d+)", name)
    # Every second part is a number.
    return tuple((i % 2, int(part) if i % 2 else 0, part) for i, part in enumerate(parts))


def in_layer_order(names: Sequence[str]) -> list[str]:
    """Return names that differ in their numbers only by these; any others as they are."""
    alike = len({re.sub(r"\d+", "0", name) for name in names}) == 1
    return sorted(names, key=natural_key) if alike else list(names)


def split_heads(layer: str, systems: Systems) -> Iterator[tuple[str, Systems]]:
    """Yield name and systems of every head of a layer.

    Raises
    ------
    InputError
        If the matrices have no head axis.
    """
    if not systems.has_heads:
        raise InputError(
            f"L of layer {layer!r} has shape {list(systems.lower.shape)}, without a head axis; "
            "pass (..., heads, chunks, C, C), or plan with granularity='tensor'"
        )
    for head, part in enumerate(systems.heads()):
        yield head_name(layer, head), part


def has_several_heads(systems: Systems) -> bool:
    """Whether the matrices have an axis of heads, and more than one of them."""
    return systems.has_heads and systems.lower.shape[HEAD_AXIS] > 1


def head_indices(systems: Systems) -> torch.Tensor:
    """Return the head of every matrix of ``systems.flat()``, `NO_HEAD` where there is no axis of heads."""
    shape = systems.lower.shape[:-2]
    if not systems.has_heads:
        return torch.full((shape.numel(),), NO_HEAD, dtype=torch.int64)
    axis = len(shape) + HEAD_AXIS + 2
    view = [-1 if i == axis else 1 for i in range(len(shape))]
    return torch.arange(shape[axis], dtype=torch.int64).view(view).expand(shape).flatten()


def layer_inverse(plan: LayerPlan, systems: Systems) -> torch.Tensor:
    """``T = (I + L)^-1`` by one program, with beta where it takes beta."""
    factored = plan.program.inverse_ports.factored
    return plan.inverse(systems.lower, systems.beta) if factored else plan.inverse(systems.lower)


def plan_inverse(plan: Plan, layer: str, systems: Systems) -> torch.Tensor:
    """``T = (I + L)^-1`` of a layer, each head by its own program where the plan has heads.

    Raises
    ------
    PlanError
        If the matrices have more heads than the plan.
    """
    return by_entry(plan, layer, systems, lambda name, given: layer_inverse(plan.layer(name), given))


def check_heads(plan: Plan, layer: str, number: int) -> None:
    """Refuse a layer with another number of heads than the plan has entries for.

    Raises
    ------
    PlanError
        With the number.
    """
    if head_name(layer, number) in plan.layers or head_name(layer, number - 1) not in plan.layers:
        raise PlanError(
            f"layer {layer!r} has {number} heads, but the plan has another number; calibrate again"
        )


def by_entry(plan: Plan, layer: str, systems: Systems, inverse: EntryInverse) -> torch.Tensor:
    """T of a layer from ``inverse(name, systems)`` for each entry of the plan that the layer has.

    Raises
    ------
    PlanError
        If the matrices have more heads than the plan.
    """
    if not is_split(plan, layer):
        return inverse(layer, systems)
    parts = list(split_heads(layer, systems))
    check_heads(plan, layer, len(parts))
    return torch.stack([inverse(*part) for part in parts], dim=HEAD_AXIS)
