"""`qinvert.verify`: does a runtime compute what the plan says?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import onnx
import torch

from qinvert import plan_io
from qinvert.errors import ExportError, VerificationError
from qinvert.export.runtimes import find_runtime
from qinvert.files import read_bytes
from qinvert.matrices import check_matrices
from qinvert.plan import LayerPlan, Plan
from qinvert.profiles import Lowering, find_profile

#: Share of values that may differ by one step where a float MatMul stays unfused.
ALLOWED_SHARE = 1e-4


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
) -> list[Verification]:
    """Run an exported graph and compare every value with the simulator.

    Integer profiles, and QDQ profiles under power-of-two scales, must agree
    bit for bit.  A QDQ graph with float scales may differ by one step in at
    most `ALLOWED_SHARE` of the values where a runtime leaves a product in
    float32; the count is in the result.

    Parameters
    ----------
    path : path
        Of the .onnx file.
    plan : Plan
        That the file was exported from.
    L : tensor or array, shape ``(..., C, C)``
        Inputs; repeated to fill the last batch.
    runtimes : sequence of str
        ``"onnxruntime"``, which runs with and without graph optimization.
    layer : str, optional
        Layer of the plan; read from the file if left out.

    Returns
    -------
    list of Verification
        One per runtime and setting.

    Raises
    ------
    VerificationError
        With the first differing element.
    ExportError
        If the file is no graph of this package, or a runtime is unknown.
    InputError
        If ``L`` is not legal.
    """
    content = read_bytes(path)
    model = read_model(content, path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    name = layer if layer is not None else metadata.get("qinvert.layer")
    layer_plan = plan.layer(name)
    lower = (
        check_matrices(L, layer_plan.chunk).to(torch.float32).reshape(-1, layer_plan.chunk, layer_plan.chunk)
    )
    source, batch = _graph_input(model, layer_plan)
    expected = layer_plan.inverse(lower).numpy()
    exact = _is_exact(metadata, layer_plan)
    results = []
    for runtime in runtimes:
        for setting, run in find_runtime(runtime)(content):
            actual = _run_batches(run, source, (lower if source == "L" else -lower).numpy(), batch)
            results.append(_compare(f"{runtime} ({setting})", actual, expected, layer_plan, exact))
            _judge(results[-1], actual, expected, _hint(metadata, plan))
    return results


def read_model(content: bytes, path: str | PathLike[str]) -> onnx.ModelProto:
    """Parse an ONNX file; external data is not followed.

    Raises
    ------
    ExportError
        If it is none.
    """
    try:
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and onnx raise unrelated types here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"{path} is no ONNX model ({reason}); export it again") from None
    return model


def _graph_input(model: onnx.ModelProto, plan: LayerPlan) -> tuple[str, int]:
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.input
    }
    outputs = [value.name for value in model.graph.output]
    name, shape = next(iter(shapes.items()), ("", []))
    if len(shapes) != 1 or name not in ("L", "M") or outputs != ["T"] or len(shape) != 4:
        raise ExportError("the graph has no input L or M and output T; pass a file that qinvert exported")
    if shape[2:] != [plan.chunk, plan.chunk]:
        raise ExportError(
            f"the graph takes {shape}, the plan's matrices are {plan.chunk} x {plan.chunk}; export again"
        )
    return name, shape[1]


def _is_exact(metadata: dict[str, str], plan: LayerPlan) -> bool:
    powers = all(np.frexp(q.scale)[0] == 0.5 for q in plan.tensors.values())
    return powers or find_profile(metadata.get("qinvert.profile", "")).lowering is Lowering.INTEGER


def _run_batches(run: Any, source: str, matrices: Any, batch: int) -> Any:
    # Cyclic repetition fills the last batch of a static graph.
    padded = matrices[np.arange(-(-len(matrices) // batch) * batch) % len(matrices)]
    parts = [run({source: padded[i : i + batch][None]})[0] for i in range(0, len(padded), batch)]
    return np.concatenate(parts)[: len(matrices)]


def _compare(runtime: str, actual: Any, expected: Any, plan: LayerPlan, exact: bool) -> Verification:
    differ = ~(actual == expected)
    steps = np.abs(actual.astype(np.float64) - expected)[differ] / plan.output.scale
    return Verification(
        runtime=runtime,
        values=expected.size,
        mismatches=int(differ.sum()),
        max_steps=float(steps.max()) if steps.size else 0.0,
        exact=exact,
    )


def _judge(result: Verification, actual: Any, expected: Any, hint: str) -> None:
    allowed = 0 if result.exact else ALLOWED_SHARE * result.values
    if result.mismatches <= allowed and result.max_steps < 1.5:
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
