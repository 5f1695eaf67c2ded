"""Reads from the graph of a chunk step what it takes and returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import onnx

from qinvert.errors import ExportError, QInvertError
from qinvert.export.graph import ELEMENT_TYPES, Sizes
from qinvert.export.interface import GraphOutput, InputType, static_shape
from qinvert.export.step_interface import Layout, States, StepInterface
from qinvert.plan.plan import LayerPlan
from qinvert.profiles import Profile

#: Shape and ONNX type of an input or output.
Described = tuple[Sizes, int]


def read_step_interface(model: onnx.ModelProto, plan: LayerPlan, profile: Profile) -> StepInterface:
    """Return what a graph takes and returns, if it is one of this package's for the plan of a chunk step.

    Raises
    ------
    ExportError
        If it is not.
    """
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    try:
        found = _interface(metadata)
        found.check(plan)
        wanted = _described(found.inputs(plan), found.input_elements(plan, profile))
        returned = _described(found.outputs(plan), found.elements(plan, profile))
    except QInvertError as error:
        raise ExportError(
            f"the graph is not one of this plan's chunk step: {error}; export it again"
        ) from None
    if _values(model.graph.input) != wanted or _values(model.graph.output) != returned:
        raise ExportError(
            f"the graph does not take and return what its metadata say: {', '.join(wanted)} to "
            f"{', '.join(returned)} of {found.heads} heads and {found.chunks} chunks; export it again"
        )
    return found


def _interface(metadata: Mapping[str, str]) -> StepInterface:
    def text(name: str) -> str:
        if f"qinvert.{name}" not in metadata:
            raise ExportError(f"it does not say its {name}")
        return metadata[f"qinvert.{name}"]

    def number(name: str, given: str) -> int:
        if not given.isascii() or not given.isdigit() or len(given) > 9:
            raise ExportError(f"its {name} {given[:20]!r} is not a number")
        return int(given)

    return StepInterface(
        heads=number("heads", text("heads")),
        batch=number("batch", text("batch")),
        chunks=number("chunks", text("chunks")),
        layout=cast("Layout", text("layout")),
        normalize=text("normalize") == "true",
        states=cast("States", text("states")),
        input_type=cast("InputType", text("input_type")),
        output=cast("GraphOutput", text("output")),
        chains=number("chains", metadata.get("qinvert.chains", "1")),
    )


def _described(shapes: Mapping[str, Sizes], elements: Mapping[str, str]) -> dict[str, Described]:
    return {name: (shape, ELEMENT_TYPES[elements[name]]) for name, shape in shapes.items()}


def _values(values: object) -> dict[str, Described]:
    found = cast("list[onnx.ValueInfoProto]", values)
    return {value.name: (static_shape(value), value.type.tensor_type.elem_type) for value in found}
