"""`qinvert.verify`: does a runtime compute what the plan says?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import torch

from qinvert import plan_io
from qinvert.arithmetic import is_power_of_two
from qinvert.checks import check_integer
from qinvert.errors import ExportError, VerificationError
from qinvert.execute import needed_beta
from qinvert.export.interface import MAX_BATCH
from qinvert.export.reading import read_model
from qinvert.export.runtimes import Run, run_settings
from qinvert.files import read_bytes
from qinvert.matrices import check_matrices, row_factors, solve
from qinvert.metrics import ErrorStatistics
from qinvert.plan import LayerPlan, Plan
from qinvert.profiles import find_profile
from qinvert.steps import BETA

Float32Array: TypeAlias = npt.NDArray[np.float32]

#: Largest input that a graph may ask for.
MAX_ELEMENTS = 2**28
#: Share of values that may differ by one step of an 8-bit grid where a float MatMul
#: stays unfused; the steps of a 16-bit grid are 256 times as many.
ALLOWED_SHARE = 1e-4
#: Steps of a 16-bit grid by which a value may differ: one that flips early is multiplied.
WIDE_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How one runtime compares with the simulator."""

    #: Runtime and its setting.
    runtime: str
    #: Values compared.
    values: int
    #: Values that differ.
    mismatches: int
    #: Largest difference, in steps of the output's grid.
    max_steps: float
    #: Whether the profile and scales promise equality bit for bit.
    exact: bool
    #: Share of values that may differ by one step where they do not.
    allowed_share: float
    #: Steps by which those may differ.
    allowed_steps: int
    #: sqnr of what the runtime returned, against the exact inverse.
    sqnr_db: float

    def __str__(self) -> str:
        equal = f"{self.values - self.mismatches} of {self.values} values equal"
        return f"{self.runtime} == simulator: {equal}"


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
    most `ALLOWED_SHARE` of the values where a runtime leaves a product in
    float32; the count is in the result.  A program that amplifies (powers
    that explode) amplifies such a step, too, and then fails here.

    Parameters
    ----------
    path : path
        Of the .onnx file.
    plan : Plan
        That the file was exported from.
    L : tensor or array, shape ``(..., C, C)``
        Inputs; repeated to fill the last batch, all of which is compared.
    runtimes : sequence of str
        ``"onnxruntime"``, which runs with and without graph optimization.
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
    expected, truth, unit = expected[filled], truth[filled], layer_plan.output.scale * unit[filled]
    arrays = {name: values[filled].cpu().numpy() for name, values in feed.items()}
    results = []
    for runtime in runtimes:
        for setting, run in run_settings(runtime, content):
            actual = _run_batches(run, arrays, batch, layer_plan.chunk)
            errors = ErrorStatistics()
            errors.update(torch.from_numpy(actual).to(truth.device), truth)
            name = f"{runtime} ({setting})"
            results.append(_compare(name, actual, expected, layer_plan, exact, errors.sqnr_db, unit.numpy()))
            _judge(results[-1], actual, expected, _hint(metadata, plan))
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
    if list(shapes)[1:] != list(plan.program.vectors) or name not in ("L", "M") or outputs != ["T"]:
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


def _run_batches(run: Run, inputs: dict[str, Float32Array], batch: int, chunk: int) -> Float32Array:
    parts, wanted = [], (1, batch, chunk, chunk)
    for start in range(0, len(next(iter(inputs.values()))), batch):
        result = np.asarray(run({name: x[start : start + batch][None] for name, x in inputs.items()}))
        if result.shape != wanted or result.dtype != np.float32:
            raise ExportError(
                f"the graph returned {result.dtype} {list(result.shape)}, not float32 {list(wanted)}; "
                "export it again"
            )
        parts.append(result[0])
    return np.concatenate(parts)


def _compare(
    runtime: str,
    actual: Float32Array,
    expected: Float32Array,
    plan: LayerPlan,
    exact: bool,
    sqnr_db: float,
    unit: Float32Array,
) -> Verification:
    differ = ~(actual == expected)
    steps = (np.abs(actual.astype(np.float64) - expected) / unit)[differ]
    extra_bits = plan.output.format.container_bits - 8
    return Verification(
        runtime=runtime,
        values=expected.size,
        mismatches=int(differ.sum()),
        max_steps=float(steps.max()) if steps.size else 0.0,
        exact=exact,
        allowed_share=0.0 if exact else ALLOWED_SHARE * 2**extra_bits,
        allowed_steps=WIDE_STEPS if extra_bits else 1,
        sqnr_db=sqnr_db,
    )


def _judge(result: Verification, actual: Float32Array, expected: Float32Array, hint: str) -> None:
    # One legal tie may fall into any sample, however small.
    allowed = 0 if result.exact else max(1.0, result.allowed_share * result.values)
    if result.mismatches <= allowed and result.max_steps < result.allowed_steps + 0.5:
        return
    index = tuple(int(i) for i in np.argwhere(~(actual == expected))[0])
    raise VerificationError(
        f"{result.runtime} differs from the simulator in {result.mismatches} of {result.values} values, "
        f"by up to {result.max_steps:.3g} steps; first at {list(index)}: {actual[index]!r} instead of "
        f"{expected[index]!r}; {hint}"
    )


def _hint(metadata: dict[str, str], plan: Plan) -> str:
    if metadata.get("qinvert.plan_sha256") != plan_io.sha256(plan):
        return "the file was exported from another plan: export it again"
    return f"metadata: {json.dumps(metadata, sort_keys=True)}"
