"""One graph of a layer whose heads have plans of their own: each head runs on its own scales."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from qinvert.calibration.head_names import entries_of, head_name, is_split, layer_name
from qinvert.chunk_step.ports import step_sizes
from qinvert.errors import ExportError
from qinvert.export.graph import GraphBuilder
from qinvert.export.interface import AUTO, Options
from qinvert.export.rules.step_ends import HEAD, HEADS
from qinvert.export.step_graph import is_step, lowered_step, step_interface
from qinvert.export.step_interface import VALID, StepInterface
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.value_channels import ValueChannels
from qinvert.profiles import Profile

#: Words in keys of metadata that each head has its own value of.
GRIDS: Final = ("scale", "zero_point")


def layer_plans(plan: Plan, layer: str | None) -> tuple[LayerPlan, ...]:
    """Return the plans that the graph of a layer is made of: one, or those of the heads of a chunk step.

    Raises
    ------
    PlanError
        If there is no such layer, or none is named where there are several.
    ExportError
        If its heads have plans of inverses, or steps of different sizes.
    """
    if layer is None or not is_split(plan, layer):
        return (plan.layer(layer),)
    plans = tuple(plan.layers[name] for name in entries_of(plan, layer))
    if not all(map(is_step, plans)):
        raise ExportError(
            f"the heads of {layer!r} have plans of inverses, each with a graph of its own; name one of them, "
            f"such as {head_name(layer, 0)!r}"
        )
    if len({step_sizes(each.program) for each in plans}) > 1:
        raise ExportError(f"the heads of {layer!r} have chunk steps of different sizes; calibrate again")
    return plans


def graph_layers(plan: Plan) -> tuple[str, ...]:
    """Return the layers that have a graph of their own: heads of a chunk step share that of their layer."""
    names = dict[str, None]()
    for name, each in plan.layers.items():
        layer = layer_name(name)
        names[layer if is_step(each) and is_split(plan, layer) else name] = None
    return tuple(names)


def heads_interface(plans: Sequence[LayerPlan], options: Options) -> StepInterface:
    """Return checked options of `qinvert.export` for the plans of all heads.

    Raises
    ------
    ExportError
        If one of them is not legal.
    """
    heads, chains = options.get("heads"), options.get("chains", AUTO)
    if heads not in (None, len(plans)):
        raise ExportError(f"heads {heads!r} are not the {len(plans)} of the plan's layer; leave heads out")
    if chains not in (AUTO, 1):
        raise ExportError(
            f"chains {chains!r} cut what heads share, but each has its own plan; leave chains out"
        )
    alone: Options = {**options, "heads": None, "chains": 1}
    found = [step_interface(replace(each, provenance={"heads": 1}), alone) for each in plans]
    return replace(found[0], heads=len(plans))


def lower_heads(plans: Sequence[LayerPlan], profile: Profile, interface: StepInterface) -> GraphBuilder:
    """Return the graph of a layer, each head by its own plan; nothing is written.

    Every input is cut along the axis of heads, and the outputs are joined along it.

    Raises
    ------
    ExportError
        If the profile cannot express a plan, or integers at the ends have a type for each head.
    PlanError
        If the state's input and output have two grids.
    """
    first, alone = plans[0], one_head(interface)
    graph, elements = GraphBuilder(), _shared_elements(plans, profile, interface)
    for name, shape in interface.inputs(first).items():
        graph.input(name, shape, elements[name])
    for i, plan in enumerate(plans):
        given = {
            name: name if name == VALID else _head(graph, name, i, [*shape])
            for name, shape in alone.inputs(plan).items()
        }
        graph.inline(lowered_step(plan, profile, alone), HEAD.format(i), given)
    for name, shape in interface.outputs(first).items():
        parts = [HEAD.format(i) + name for i in range(len(plans))]
        graph.node("Concat", parts, name, shape, graph.element(parts[0]), axis=HEADS)
        graph.output(name)
    return graph


def one_head(interface: StepInterface) -> StepInterface:
    """Return what one head of a graph takes and returns."""
    return replace(interface, heads=1, chains=1)


def heads_metadata(
    plans: Sequence[LayerPlan], profile: Profile, interface: StepInterface
) -> Mapping[str, str]:
    """Return everything that a host needs to drive the graph; scales and zero points are JSON lists."""
    whole = interface.metadata(replace(plans[0], channels=joined_channels(plans)), profile)
    each = [one_head(interface).metadata(plan, profile) for plan in plans]
    own = [key for key in whole if any(word in key for word in GRIDS)]
    return {**whole, **{key: json.dumps([json.loads(said[key]) for said in each]) for key in own}}


def joined_channels(plans: Sequence[LayerPlan]) -> ValueChannels | None:
    """Return what happens to the values of all heads, a row for each; None where nothing does.

    Raises
    ------
    ExportError
        If only some heads rotate their values.
    """
    size = step_sizes(plans[0].program).value_size
    neutral = ValueChannels(exponents=((0,) * size,), rotated=False)
    found = [plan.channels or neutral for plan in plans]
    if all(channels.changes_nothing for channels in found):
        return None
    if len({channels.rotated for channels in found}) > 1:
        raise ExportError("some heads rotate their values and some do not; calibrate again")
    rows = tuple(row for channels in found for row in channels.exponents)
    return ValueChannels(exponents=rows, rotated=found[0].rotated)


def _head(graph: GraphBuilder, name: str, head: int, shape: list[int | str]) -> str:
    bounds = [
        graph.initializer(f"index/{value}", np.array([value], np.int64)) for value in (head, head + 1, HEADS)
    ]
    return graph.node("Slice", [name, *bounds], HEAD.format(head) + name, shape, graph.element(name))


def _shared_elements(
    plans: Sequence[LayerPlan], profile: Profile, interface: StepInterface
) -> dict[str, str]:
    """Return the type of every input; outputs, too, must have one."""
    for ends in (interface.input_elements, interface.elements):
        found = [ends(plan, profile) for plan in plans]
        differing = [name for name, element in found[0].items() if any(x[name] != element for x in found)]
        if differing:
            raise ExportError(
                f"{differing[0]} has integers of another width in each head; export with float ends, or "
                "calibrate with the same width for all"
            )
    return interface.input_elements(plans[0], profile)
