"""Grids per head: every head of a layer becomes a layer of the plan.

A plan with granularity "head" has entries ``LAYER/head_0``, ``LAYER/head_1``
and so on, each with a program, formats and scales of its own, and each
exported as a graph of its own: per-tensor scales are all that compilers take.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

import torch

from qinvert.calibration.planning.rules import Granularity as Granularity
from qinvert.errors import InputError, PlanError
from qinvert.plan.plan import LayerPlan, Plan

#: ``inverse(name, L, beta) -> T`` for an entry of a plan.
EntryInverse: TypeAlias = Callable[[str, torch.Tensor, torch.Tensor | None], torch.Tensor]

#: Axis of L that counts heads: ``[batch, heads, chunks, C, C]``, or without the batch.
HEAD_AXIS: Final = -4


def head_name(layer: str, head: int) -> str:
    """Name of one head's entry in a plan."""
    return f"{layer}/head_{head}"


def layer_name(name: str) -> str:
    """Name of the layer that an entry of a plan belongs to."""
    return re.sub(r"/head_\d+$", "", name)


def split_heads(
    layer: str, lower: torch.Tensor, beta: torch.Tensor | None = None
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """Yield (name, matrices ``(..., chunks, C, C)``, beta ``(..., chunks, C)`` or None) of every head.

    Raises
    ------
    InputError
        If the matrices have no head axis.
    """
    if lower.ndim < -HEAD_AXIS:
        raise InputError(
            f"L of layer {layer!r} has shape {list(lower.shape)}, without a head axis; "
            "pass (..., heads, chunks, C, C), or plan with granularity='tensor'"
        )
    for head, matrices in enumerate(lower.unbind(HEAD_AXIS)):
        yield head_name(layer, head), matrices, None if beta is None else beta.select(HEAD_AXIS + 1, head)


def is_split(plan: Plan, layer: str) -> bool:
    """Whether the plan has the heads of that layer instead of the layer itself."""
    return layer not in plan.layers and head_name(layer, 0) in plan.layers


def layer_inverse(plan: LayerPlan, lower: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
    """``T = (I + L)^-1`` by one program, with beta where it takes beta."""
    return plan.inverse(lower, beta) if plan.program.vectors else plan.inverse(lower)


def plan_inverse(
    plan: Plan, layer: str, lower: torch.Tensor, beta: torch.Tensor | None = None
) -> torch.Tensor:
    """``T = (I + L)^-1`` of a layer, each head by its own program where the plan has heads.

    Raises
    ------
    PlanError
        If the matrices have more heads than the plan.
    """
    return by_entry(plan, layer, lower, beta, lambda name, *given: layer_inverse(plan.layer(name), *given))


def by_entry(
    plan: Plan, layer: str, lower: torch.Tensor, beta: torch.Tensor | None, inverse: EntryInverse
) -> torch.Tensor:
    """T of a layer from ``inverse(name, L, beta)`` for each entry of the plan that the layer has.

    Raises
    ------
    PlanError
        If the matrices have more heads than the plan.
    """
    if not is_split(plan, layer):
        return inverse(layer, lower, beta)
    parts = list(split_heads(layer, lower, beta))
    if head_name(layer, len(parts)) in plan.layers or parts[-1][0] not in plan.layers:
        raise PlanError(f"layer {layer!r} has {len(parts)} heads, the plan another number; calibrate again")
    return torch.stack([inverse(*part) for part in parts], dim=HEAD_AXIS)
