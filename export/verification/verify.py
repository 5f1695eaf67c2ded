"""`qinvert.verify`: does a runtime compute what the plan says?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import onnx
import onnx.utils
import torch

from qinvert.errors import ExportError, VerificationError, lookup
from qinvert.export.exporting import serialize
from qinvert.export.functions import single_layer
from qinvert.export.interface import GraphInput, Interface
from qinvert.export.lowering.keys import FROM_KEYS
from qinvert.export.reading import read_model
from qinvert.export.runtimes import RUNTIMES, Execution, Feed, execute
from qinvert.export.verification.comparison import Verification, compare, judge
from qinvert.export.verification.references import (
    Reference,
    Returned,
    graph_inputs,
    lower_from_keys,
    reference,
)
from qinvert.files import read_bytes
from qinvert.numerics.scales import is_power_of_two
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.profiles import Profile, find_profile
from qinvert.program.ports import BETA
from qinvert.systems import Systems

#: Error of L, relative to its largest element, that a prologue of float operators stays far
#: below, by the type that a processor has for them.
KEYS_TOLERANCE = {"float32": 1e-4, "float16": 2e-3}


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
    bit for bit, but for a float32 L that is built in the graph.  A QDQ graph
    with float scales may differ by one step in at most 1e-4 of the values
    where a runtime leaves a product in float32; the count is in the result.
    A program that amplifies (powers that explode) amplifies such a step, too,
    and then fails here.  A processor with a rounding of its own may differ by
    `Runtime.own_steps` anywhere, and by more in one value of a thousand.
    One that takes `Runtime.inputs` of float16 is given, and compared on,
    inputs of that precision.

    Parameters
    ----------
    path : path
        Of the .onnx file.
    plan : Plan
        That the file was exported from.
    L : tensor or array, shape ``(..., C, C)``
        Inputs; repeated to fill the last batch, all of which is compared.
        For a graph from keys a mapping of ``k (..., C, D)``, ``beta (..., C)``
        and ``g (..., C)``: the L that a runtime builds of them must be right
        in float32, and the simulator is given that one.
    runtimes : sequence of str
        Names of `qinvert.export.runtimes.RUNTIMES`.
    layer : str, optional
        Layer of the plan; read from the file if left out.  Of a model with
        a function per layer that function is run, alone and inlined.
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
    whole = read_model(content, path)
    model = single_layer(whole, layer)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    name = layer if layer is not None else metadata.get("qinvert.layer")
    layer_plan = plan.layer(name)
    interface = Interface.of(model, layer_plan)
    content = content if model is whole else serialize(model)
    inputs = graph_inputs(layer_plan, interface, L, beta)
    if not runtimes:
        raise ExportError("no runtime was named; pass for example runtimes=('onnxruntime',)")
    # Every slot of the last batch computes something: fill it, and compare all of it.
    assert interface.batch is not None
    count = len(next(iter(inputs.values())))
    filled = np.arange(-(-count // interface.batch) * interface.batch) % count
    inputs = {name: values[filled] for name, values in inputs.items()}
    profile = find_profile(metadata.get("qinvert.profile", plan.target))
    storage = profile.storage_of(layer_plan.output.format)
    from_keys = interface.input is GraphInput.KEYS
    exact, results = not from_keys and is_exact(profile, layer_plan), []
    references: dict[tuple[str, str], Reference] = {}
    for runtime in runtimes:
        chosen = lookup(RUNTIMES, runtime, "runtime", ExportError)
        element, rounding = chosen.inputs, chosen.rounding
        given = {name: values.to(getattr(torch, element)).to(values.dtype) for name, values in inputs.items()}
        rows = given[BETA].squeeze(-1) if layer_plan.program.inverse_ports.factored else None
        built = _built(model, interface, given, runtime) if from_keys else {}
        if not from_keys and (element, rounding) not in references:
            lower = _lower(interface, given)
            found = reference(layer_plan, interface, storage, Systems(lower=lower, beta=rows), rounding)
            references[element, rounding] = found
        for execution in execute(runtime, content, _feeds(given, interface.batch)):
            wanted = references.get((element, rounding))
            if wanted is None:
                systems = Systems(lower=built[execution.setting], beta=rows)
                wanted = reference(layer_plan, interface, storage, systems, rounding)
            actual = _joined(execution, interface.batch, wanted.expected)
            results.append(compare(runtime, execution, actual, wanted, exact))
            judge(runtime, results[-1], actual, wanted, _hint(metadata, plan))
    return results


def read_interface(path: str | PathLike[str], plan: Plan, layer: str) -> Interface:
    """Return what the exported graph of a layer takes and returns.

    Raises
    ------
    ExportError
        If the file is no graph of this package.
    """
    return Interface.of(single_layer(read_model(read_bytes(path), path), layer), plan.layer(layer))


def _lower(interface: Interface, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    matrices = inputs[str(interface.input)]
    return matrices if interface.input is GraphInput.L else -matrices


def _built(
    model: onnx.ModelProto, interface: Interface, inputs: Mapping[str, torch.Tensor], runtime: str
) -> dict[str, torch.Tensor]:
    """L as each setting of a runtime builds it from keys, by the part of the graph that does so."""
    name = next((n.output[0] for n in model.graph.node if n.output[0].startswith(FROM_KEYS)), None)
    if name is None or interface.batch is None:
        raise ExportError(f"the graph has no tensor {FROM_KEYS!r}; export it again")
    part = onnx.utils.Extractor(model).extract_model([value.name for value in model.graph.input], [name])
    expected = lower_from_keys(inputs).cpu()
    like = expected.to(torch.float32).numpy()
    built = {}
    for execution in execute(runtime, serialize(part), _feeds(inputs, interface.batch)):
        found = torch.from_numpy(_joined(execution, interface.batch, like))
        error = float((expected + found).abs().amax())
        tolerance = KEYS_TOLERANCE[RUNTIMES[runtime].inputs]
        if not error <= tolerance * max(1.0, float(expected.abs().amax())):
            raise VerificationError(
                f"{runtime} ({execution.setting}) builds L from keys with an error of {error:.3g}; it should "
                f"stay below {tolerance:g} of the largest element: run float operators in float32"
            )
        built[execution.setting] = torch.tril(-found, -1)
    return built


def is_exact(profile: Profile, plan: LayerPlan) -> bool:
    """Whether a graph must agree with the simulator bit for bit."""
    # Sums of products of 16 bits by 8 are wider than float32 holds, whatever the scales.
    exact = all(is_power_of_two(q.scale) and q.format.container_bits == 8 for q in plan.tensors.values())
    return exact or profile.exact


def _feeds(inputs: Mapping[str, torch.Tensor], batch: int) -> list[Feed]:
    arrays = {name: values.cpu().numpy() for name, values in inputs.items()}
    count = len(next(iter(arrays.values())))
    return [
        {name: x[start : start + batch][None] for name, x in arrays.items()}
        for start in range(0, count, batch)
    ]


def _joined(execution: Execution, batch: int, like: Returned) -> Returned:
    """Return what a graph returned for every batch, of the type and shape of ``like``."""
    wanted = (1, batch, *like.shape[1:])
    for result in execution.outputs:
        if result.shape != wanted or result.dtype != like.dtype:
            raise ExportError(
                f"the graph returned {result.dtype} {list(result.shape)}, not {like.dtype} {list(wanted)}; "
                "export it again"
            )
    joined: Returned = np.concatenate(execution.outputs, axis=1)[0]
    return joined


def _hint(metadata: dict[str, str], plan: Plan) -> str:
    if metadata.get("qinvert.plan_sha256") != plan.sha256:
        return "the file was exported from another plan: export it again"
    return f"metadata: {json.dumps(metadata, sort_keys=True)}"
