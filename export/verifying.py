"""`qinvert.verify`: does a runtime compute what the plan says?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import onnx
import torch

from qinvert import plan_io
from qinvert.arithmetic import is_power_of_two
from qinvert.checks import check_integer
from qinvert.errors import ExportError
from qinvert.execute import needed_beta
from qinvert.export.comparing import Float32Array, Reference, Verification
from qinvert.export.exporting import INPUTS, MAX_BATCH
from qinvert.export.reading import read_model
from qinvert.export.runtimes import Execution, Feed, execute
from qinvert.files import read_bytes
from qinvert.matrices import check_matrices, row_factors, solve
from qinvert.plan import LayerPlan, Plan
from qinvert.profiles import find_profile
from qinvert.steps import BETA

#: Largest input that a graph may ask for.
MAX_ELEMENTS = 2**28


def verify(
    path: str | PathLike[str],
    plan: Plan,
    L: Any,  # noqa: N803 - the field's name of this matrix
    *,
    runtimes: Sequence[str] = ("onnxruntime",),
    layer: str | None = None,
    beta: Any = None,
) -> list[Verification]:
    """Run an exported graph and compare every value with the simulator.

    Integer profiles, and QDQ profiles under power-of-two scales, must agree
    bit for bit.  A QDQ graph with float scales may differ by one step in at
    most 1e-4 of the values where a runtime leaves a product in
    float32; the count is in the result.  A program that amplifies (powers
    that explode) amplifies such a step, too, and then fails here.  A processor
    with a rounding of its own may differ by `Runtime.own_steps` anywhere, and
    by more in one value of a thousand.

    Parameters
    ----------
    path : path
        Of the .onnx file.
    plan : Plan
        That the file was exported from.
    L : tensor or array, shape ``(..., C, C)``
        Inputs; repeated to fill the last batch, all of which is compared.
    runtimes : sequence of str
        Names of `qinvert.export.runtimes.RUNTIMES`.
    layer : str, optional
        Layer of the plan; read from the file if left out.
    beta : tensor or array, shape ``(..., C)``, optional
        In [0, 2]; a factored plan needs it, others ignore it.

    Returns
    -------
    list of Verification
        One per runtime and setting.

    Raises
    ------
    VerificationError
        With the first differing element.
    ExportError
        If the file is no graph of this package, a runtime is unknown, or
        refuses the graph.
    InputError
        If ``L`` or ``beta`` is not legal.
    """
    content = read_bytes(path)
    model = read_model(content, path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    name = layer if layer is not None else metadata.get("qinvert.layer")
    layer_plan = plan.layer(name)
    source, batch = _graph_input(model, layer_plan)
    lower, rows = _inputs(layer_plan, L, beta)
    expected = layer_plan.inverse(lower, rows).cpu().numpy()
    feed, unit = {source: lower if source == "L" else -lower}, torch.ones(len(lower), 1, 1)
    if rows is not None:
        feed[BETA], unit = rows.unsqueeze(-1), row_factors(rows, torch.float32).cpu()
    truth, exact = solve(lower), _is_exact(metadata, layer_plan)
    if not runtimes:
        raise ExportError("no runtime was named; pass for example runtimes=('onnxruntime',)")
    # Every slot of the last batch computes something: fill it, and compare all of it.
    filled = np.arange(-(-len(lower) // batch) * batch) % len(lower)
    reference = Reference(
        plan=layer_plan,
        expected=expected[filled],
        truth=truth[filled],
        unit=(layer_plan.output.scale * unit[filled]).numpy(),
        exact=exact,
    )
    arrays = {name: values[filled].cpu().numpy() for name, values in feed.items()}
    results = []
    for runtime in runtimes:
        for execution in execute(runtime, content, _feeds(arrays, batch)):
            actual = _joined(execution, batch, layer_plan.chunk)
            results.append(reference.compare(runtime, execution, actual))
            reference.judge(results[-1], actual, _hint(metadata, plan))
    return results


def _inputs(plan: LayerPlan, matrices: Any, beta: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    lower = check_matrices(matrices, plan.chunk).to(torch.float32)
    rows = needed_beta(plan.program, lower, beta)
    if rows is not None:
        rows = rows.to(torch.float32).reshape(-1, plan.chunk)
    return lower.reshape(-1, plan.chunk, plan.chunk), rows


def _graph_input(model: onnx.ModelProto, plan: LayerPlan) -> tuple[str, int]:
    shapes = {value.name: _static_shape(value) for value in model.graph.input}
    outputs = [value.name for value in model.graph.output]
    name, shape = next(iter(shapes.items()), ("", []))
    if list(shapes)[1:] != list(plan.program.vectors) or name not in INPUTS or outputs != ["T"]:
        wanted = " and ".join(["L or M", *plan.program.vectors])
        raise ExportError(f"the graph has no input {wanted} and output T; pass a file that qinvert exported")
    returned = _static_shape(model.graph.output[0])
    if len(shape) != 4 or shape[0] != 1 or shape[2:] != [plan.chunk, plan.chunk] or returned != shape:
        raise ExportError(
            f"the graph maps {shape} to {returned}, the plan needs [1, batch, {plan.chunk}, {plan.chunk}]; "
            "export again"
        )
    most = min(MAX_BATCH, MAX_ELEMENTS // plan.chunk**2)
    return name, check_integer("batch of the graph", shape[1], 1, most, ExportError, "; export again")


def _static_shape(value: onnx.ValueInfoProto) -> list[int | str]:
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims]


def _is_exact(metadata: dict[str, str], plan: LayerPlan) -> bool:
    # Sums of products of 16 bits by 8 are wider than float32 holds, whatever the scales.
    exact = all(is_power_of_two(q.scale) and q.format.container_bits == 8 for q in plan.tensors.values())
    return exact or find_profile(metadata.get("qinvert.profile", "")).exact


def _feeds(inputs: dict[str, Float32Array], batch: int) -> list[Feed]:
    count = len(next(iter(inputs.values())))
    return [
        {name: x[start : start + batch][None] for name, x in inputs.items()}
        for start in range(0, count, batch)
    ]


def _joined(execution: Execution, batch: int, chunk: int) -> Float32Array:
    wanted = (1, batch, chunk, chunk)
    for result in execution.outputs:
        if result.shape != wanted or result.dtype != np.float32:
            raise ExportError(
                f"the graph returned {result.dtype} {list(result.shape)}, not float32 {list(wanted)}; "
                "export it again"
            )
    joined: Float32Array = np.concatenate(execution.outputs, axis=1)[0]
    return joined


def _hint(metadata: dict[str, str], plan: Plan) -> str:
    if metadata.get("qinvert.plan_sha256") != plan_io.sha256(plan):
        return "the file was exported from another plan: export it again"
    return f"metadata: {json.dumps(metadata, sort_keys=True)}"
