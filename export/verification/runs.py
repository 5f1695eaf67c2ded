"""Runs of a graph on all matrices, batch by batch, and of the part of it that builds L from keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import onnx
import onnx.utils
import torch

from qinvert.errors import ExportError, VerificationError
from qinvert.export.exporting import serialize
from qinvert.export.interface import GraphInput, Interface
from qinvert.export.lowering.keys import FROM_KEYS
from qinvert.export.runtimes import Execution, Feed, Runtime, execute
from qinvert.export.verification.references import Returned, lower_from_keys
from qinvert.export.verification.tolerance import KEYS_TOLERANCE
from qinvert.numerics.rounding import dequantize, quantize
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.profiles import Profile

#: Inputs of all matrices by name, each ``[N, rows, columns]``.
Inputs: TypeAlias = Mapping[str, torch.Tensor]


def filled(inputs: Inputs, batch: int) -> Inputs:
    """Repeat matrices until they fill the last batch: every slot of it computes something."""
    count = len(next(iter(inputs.values())))
    taken = np.arange(-(-count // batch) * batch) % count
    return {name: values[taken] for name, values in inputs.items()}


def as_taken(inputs: Inputs, runtime: Runtime) -> Inputs:
    """Round inputs to the type in which they enter the processor; they stay float32."""
    element = getattr(torch, runtime.inputs)
    return {name: values.to(element).to(values.dtype) for name, values in inputs.items()}


def onto_grids(inputs: Inputs, plan: QuantizedProgram, interface: Interface) -> Inputs:
    """Round inputs that the graph takes as integers onto their grids; they stay float32."""
    found = dict(inputs)
    for name in interface.integer_inputs(plan):
        grid = plan.tensors[name]
        found[name] = dequantize(quantize(inputs[name], grid.scale, grid.format), grid.scale, grid.format)
    return found


def stored(inputs: Inputs, plan: QuantizedProgram, interface: Interface, profile: Profile) -> Inputs:
    """Return inputs as the graph takes them: integers in the format of its ends, or float32."""
    found = dict(inputs)
    for name in interface.integer_inputs(plan):
        grid = plan.tensors[name]
        end = profile.end_of(grid.format)
        integers = quantize(inputs[name], grid.scale, grid.format) + (end.zero_point - grid.format.zero_point)
        found[name] = integers.to(getattr(torch, end.element))
    return found


def feeds(inputs: Inputs, batch: int) -> list[Feed]:
    """Return the inputs of every call."""
    arrays = {name: values.cpu().numpy() for name, values in inputs.items()}
    count = len(next(iter(arrays.values())))
    return [
        {name: x[start : start + batch][None] for name, x in arrays.items()}
        for start in range(0, count, batch)
    ]


def joined(execution: Execution, batch: int, like: Returned) -> Returned:
    """Return what a graph returned for every batch, of the type and shape of ``like``.

    Raises
    ------
    ExportError
        If it has another type or shape.
    """
    wanted = (1, batch, *like.shape[1:])
    for result in execution.outputs:
        if result.shape != wanted or result.dtype != like.dtype:
            raise ExportError(
                f"the graph returned {result.dtype} {list(result.shape)}, not {like.dtype} {list(wanted)}; "
                "export it again"
            )
    every: Returned = np.concatenate(execution.outputs, axis=1)[0]
    return every


def given_lower(interface: Interface, inputs: Inputs) -> torch.Tensor:
    """L of the inputs of a graph that takes L or M."""
    matrices = inputs[str(interface.input)]
    return matrices if interface.input is GraphInput.L else -matrices


def built_lower(
    model: onnx.ModelProto, runtime: Runtime, inputs: Inputs, batch: int
) -> dict[str, torch.Tensor]:
    """L as each setting of a runtime builds it from keys, by the part of the graph that does so.

    Raises
    ------
    ExportError
        If the graph has no such part, or the runtime refuses it.
    VerificationError
        If an L has a larger error than float operators can cause.
    """
    part = serialize(_part_from_keys(model))
    expected = lower_from_keys(inputs).cpu()
    like = expected.to(torch.float32).numpy()
    built = {}
    for execution in execute(runtime.name, part, feeds(inputs, batch)):
        # The part returns M = -L.
        found = -torch.from_numpy(joined(execution, batch, like))
        _check_built(runtime, execution, found, expected)
        built[execution.setting] = torch.tril(found, -1)
    return built


def _part_from_keys(model: onnx.ModelProto) -> onnx.ModelProto:
    name = next((n.output[0] for n in model.graph.node if n.output[0].startswith(FROM_KEYS)), None)
    if name is None:
        raise ExportError(f"the graph has no tensor {FROM_KEYS!r}; export it again")
    return onnx.utils.Extractor(model).extract_model([value.name for value in model.graph.input], [name])


def _check_built(runtime: Runtime, execution: Execution, found: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((expected - found).abs().amax())
    tolerance = KEYS_TOLERANCE[runtime.inputs]
    # NaN fails.
    if not error <= tolerance * max(1.0, float(expected.abs().amax())):
        raise VerificationError(
            f"{runtime.name} ({execution.setting}) builds L from keys with an error of {error:.3g}; it "
            f"should stay below {tolerance:g} of the largest element: run float operators in float32"
        )
