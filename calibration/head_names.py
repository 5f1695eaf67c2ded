"""What entries of a plan are called whose heads have plans of their own."""

from __future__ import annotations

import re
from functools import partial

from qinvert.plan.plan import Plan


def head_name(layer: str, head: int) -> str:
    """Name of one head's entry in a plan."""
    return f"{layer}/head_{head}"


def layer_name(name: str) -> str:
    """Name of the layer that an entry of a plan belongs to."""
    return re.sub(r"/head_\d+$", "", name)


def head_number(name: str) -> int | None:
    """Return the head that an entry of a plan stands for; None where it stands for a whole layer."""
    found = re.search(r"/head_(\d+)$", name)
    return None if found is None else int(found[1])


def is_split(plan: Plan, layer: str) -> bool:
    """Whether the plan has the heads of that layer instead of the layer itself."""
    return layer not in plan.layers and head_name(layer, 0) in plan.layers


def entries_of(plan: Plan, layer: str) -> list[str]:
    """Return the entries of a plan that a layer has: its own, or one of each head in the order of heads."""
    if not is_split(plan, layer):
        return [layer]
    own = [name for name in plan.layers if layer_name(name) == layer]
    return [name for name in map(partial(head_name, layer), range(len(own))) if name in plan.layers]
