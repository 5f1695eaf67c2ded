"""The graph of a window: traced, with the steps of its layers put in their places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import onnx
import torch

from qinvert.chunk_step.ports import BETA, LOG_DECAY
from qinvert.errors import ExportError
from qinvert.export.deployment.products import fold_transposes, mark_floats, mark_others
from qinvert.export.deployment.states import SUFFIX, State
from qinvert.export.deployment.step_calls import LayerStep, step_names
from qinvert.export.deployment.translations import (
    drop_empty_parts,
    join_softplus,
    translations,
    write_squares,
)
from qinvert.export.deployment.window import Window
from qinvert.export.graph import DOMAIN, FUNCTION_IR_VERSION
from qinvert.export.metadata import describe, layer_metadata, provenance
from qinvert.export.rules.step_ends import MAX_RANK
from qinvert.export.step_graph import lower_step
from qinvert.export.step_interface import VALID
from qinvert.export.whole_models.check import LOGITS
from qinvert.export.whole_models.tracing import opset_for, trace
from qinvert.hardware import Compiler
from qinvert.plan.plan import Plan
from qinvert.profiles import Profile

if TYPE_CHECKING:
    import onnx_ir

#: Input of token ids.
TOKENS: Final = "input_ids"
#: Operators that they do not take, or that they leave on the CPU.
FORBIDDEN: Final = frozenset(
    {"CumSum", "If", "Loop", "NonZero", "Scan", "ScatterElements", "ScatterND", "Trilu", "Where"}
)
#: A root-mean-square norm as one operator, and the first operator set in which PyTorch's exporter writes
#: it.  In Hexagon's emulator the operator is off by 3e-4 at any x; its parts, in float16, by 6e-3 at an
#: x of 1e-3.  The compiler has no cost for the operator.
NORM: Final = "RMSNormalization"
NORM_OPSET: Final = 23


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One of the two graphs."""

    file: str
    model: onnx_ir.Model
    states: tuple[State, ...]
    tokens: int
    #: Products with weights outside the planned layers.
    products: int


def window_graph(
    window: Window,
    plan: Plan,
    profile: Profile,
    tokens: int,
    *,
    masked: bool,
    opset: int | None = None,
    compiler: Compiler | None = None,
) -> onnx_ir.Model:
    """Return ``input_ids, valid, states -> logits, states`` as one graph of plain operators.

    Parameters
    ----------
    window : Window
        Inside `qinvert.export.deployment.window.windowed`; its calls are recorded.
    plan : Plan
    profile : Profile
        Of the steps.
    tokens : int
        Tokens of a call.
    masked : bool
        Whether a call may have fewer tokens: the graph then has the input ``valid``.
    opset : int, optional
        Least operator set; the profile's if left out.  With it weights are about to be quantized.
    compiler : Compiler, optional
        That of the chip: norms are one operator where it takes that.

    Raises
    ------
    ExportError
        If PyTorch cannot trace the model, the profile cannot express a step, or the graph has a
        tensor of too high a rank or an operator that NPUs do not take.
    """
    example: dict[str, Any] = {TOKENS: torch.zeros(1, tokens, dtype=torch.int32), "states": window.zeros()}
    names = [TOKENS, *(state.name for state in window.states)]
    if masked:
        example[VALID] = torch.ones(1, tokens, dtype=torch.float32)
        names.append(VALID)
    outputs = [LOGITS, *(state.name + SUFFIX for state in window.states)]
    options = {"input_names": names, "output_names": outputs, "custom_translation_table": translations()}
    least = max(opset_for(profile, None), opset or 0, NORM_OPSET if takes_norms(compiler) else 0)
    model = trace(window, example, least, **options)
    _put_steps(model, window, plan, profile)
    join_softplus(model)
    write_squares(model)
    drop_empty_parts(model)
    fold_transposes(model, shared=opset is not None)
    tidy(model)
    check_operators(model)
    model.metadata_props.update(provenance(plan, profile))
    return model


def takes_norms(compiler: Compiler | None) -> bool:
    """Whether a compiler takes a norm as one operator."""
    return compiler is not None and NORM in compiler.operators and compiler.opset >= NORM_OPSET


def _put_steps(model: onnx_ir.Model, window: Window, plan: Plan, profile: Profile) -> None:
    """Put the nodes of every layer's step in the place of its call."""
    from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass
    from onnx_ir.serde import deserialize_function

    mark_floats(_gates(model, window))
    mark_others(model, window.model)
    target = replace(profile, opset=model.opset_imports[""])
    names = step_names(plan)
    for name, step in window.steps.items():
        function = deserialize_function(_function(step, target, names[name]))
        model.functions[function.identifier()] = function
    model.ir_version = max(model.ir_version, FUNCTION_IR_VERSION)
    InlinePass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def _gates(model: onnx_ir.Model, window: Window) -> Iterator[onnx_ir.Value]:
    """What steps read as beta and decays, and what routers and indexers sort."""
    names = [name for step in window.steps.values() for name in step.interface.inputs(step.plan)]
    gates = [names.index(port) for port in (BETA, LOG_DECAY)]
    for node in model.graph:
        at = gates if node.domain == DOMAIN else [0] if node.op_type == "TopK" else []
        yield from (value for i in at if (value := node.inputs[i]) is not None)


def _function(step: LayerStep, profile: Profile, name: str) -> onnx.FunctionProto:
    """Return the step of a layer, whose tensors start with the name of the layer."""
    metadata = layer_metadata(step.name, step.plan, profile, step.interface)
    graph = lower_step(step.plan, profile, step.interface)
    function = graph.function(name, profile.opset, metadata, describe(step.plan, step.interface))
    ends = {*function.input}

    def named(tensor: str) -> str:
        return tensor if not tensor or tensor in ends else f"{step.name}/{tensor}"

    for node in function.node:
        node.name = named(node.name)
        node.input[:] = [named(tensor) for tensor in node.input]
        node.output[:] = [named(tensor) for tensor in node.output]
    function.output[:] = [named(tensor) for tensor in function.output]
    for value in function.value_info:
        value.name = named(value.name)
    return function


def tidy(model: onnx_ir.Model) -> None:
    """Remove what nothing reads, share equal constants, and note every shape."""
    from onnx_ir.passes.common import (
        DeduplicateInitializersPass,
        IdentityEliminationPass,
        NameFixPass,
        RemoveUnusedNodesPass,
        RemoveUnusedOpsetsPass,
        ShapeInferencePass,
        TopologicalSortPass,
    )

    passes = (
        IdentityEliminationPass(),
        RemoveUnusedNodesPass(),
        DeduplicateInitializersPass(),
        RemoveUnusedOpsetsPass(),
        TopologicalSortPass(),
        NameFixPass(),
        ShapeInferencePass(),
    )
    for step in passes:
        step(model)


def check_operators(model: onnx_ir.Model) -> None:
    """Refuse a tensor of rank above `MAX_RANK`, one of no or unknown size, and an operator of `FORBIDDEN`.

    Raises
    ------
    ExportError
        With all of them, by kind.
    """
    found = Counter(_faults(model))
    if found:
        listed = "; ".join(f"{fault} ({count})" if count > 1 else fault for fault, count in found.items())
        raise ExportError(
            f"the model has what NPUs do not take: {listed}; deploy a model without it, or export the layers "
            "alone (qinvert.export)"
        )


def _faults(model: onnx_ir.Model) -> Iterator[str]:
    for node in model.graph.all_nodes():
        if node.op_type in FORBIDDEN:
            yield f"operator {node.op_type} at {node.outputs[0].name}"
        for value in node.outputs:
            if value.shape is None or not value.shape.is_static():
                yield f"no fixed shape at {value.name}"
            elif 0 in value.shape:
                yield f"nothing in {value.name}"
            elif len(value.shape) > MAX_RANK:
                yield f"{len(value.shape)} axes at {value.name}"


def operators(model: onnx_ir.Model) -> dict[str, int]:
    """Count the nodes of a graph by their operators."""
    return dict(sorted(Counter(node.op_type for node in model.graph.all_nodes()).items()))


def weight_bytes(model: onnx_ir.Model) -> int:
    """Bytes of the constants."""
    constants = (value.const_value for value in model.graph.initializers.values())
    return sum(constant.nbytes for constant in constants if constant is not None)
