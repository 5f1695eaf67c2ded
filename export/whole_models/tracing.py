"""Models that call ``TriInv`` where they solve a triangular system, for exporters that trace them."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import torch

from qinvert.calibration.heads import by_entry
from qinvert.calibration.patching import by_layer, device_of, patched_by_layer
from qinvert.calibration.running import LayerInverse
from qinvert.delta_rule.chunks import DeltaChunks
from qinvert.errors import ExportError, MissingDependencyError, reason
from qinvert.export.functions import LAYERS, function_names, layer_function
from qinvert.export.graph import DOMAIN, FUNCTION_IR_VERSION, LOCAL_FUNCTION_IR_VERSION
from qinvert.export.interface import Interface
from qinvert.export.metadata import provenance
from qinvert.export.whole_models.sparse_attention import traceable_indexers
from qinvert.plan.plan import Plan
from qinvert.profiles import Profile
from qinvert.systems import Systems

if TYPE_CHECKING:
    import onnx_ir

#: First operator set that PyTorch's exporter writes.
FIRST_OPSET: Final = 18
#: Where `torch.export` says that it stopped.
PLACE: Final = re.compile(r"Caused by: \((\S+:\d+) in \w+\)")
#: Loggers of the exporter, and what each says of things that are not needed.
NOTICES: Final = {
    "torch.onnx._internal.exporter._registration": "torchvision is not installed",
    "onnxscript.optimizer._constant_folding": "Skipping constant folding",
}
#: Notes of PyTorch's exporter: its own nodes, and source files of the machine that traced.
NOTES: Final = "pkg.torch."


def require_onnx_ir() -> ModuleType:
    """Import onnx_ir, or say how to get it and what else exporting a model needs.

    Raises
    ------
    MissingDependencyError
        If onnxscript, which PyTorch's exporter needs, or onnx_ir, which comes with it, is not installed.
    """
    try:
        import onnx_ir
        import onnxscript  # noqa: F401 - torch.onnx imports it itself
    except ImportError:
        raise MissingDependencyError(
            "this needs onnxscript, which is not installed; run: pip install 'qinvert[model]'"
        ) from None
    module: ModuleType = onnx_ir
    return module


@contextmanager
def traceable(model: torch.nn.Module, plan: Plan) -> Iterator[torch.nn.Module]:
    """Have every delta-rule layer call ``qinvert::TriInv_LAYER(L) -> T`` inside a ``with`` block.

    This is for `torch.export` and what builds on it.  Sparse attention that loops
    over tokens is also replaced, see `traceable_indexers`.  Running the model does
    not give meaningful values then: the calls get their meaning from `attach_functions`.

    Raises
    ------
    InputError, PlanError
        See `qinvert.patched`.
    """
    by_layer(model, plan)
    forget_compiled()
    # With gradients, a scan would be traced with its derivative.
    with traceable_indexers(model), patched_by_layer(model, calls_of(plan)), torch.no_grad():
        yield model


def calls_of(plan: Plan, taken: Collection[str] = ()) -> LayerInverse:
    """Return an inverse that a trace sees as one node for each entry of the plan."""
    names = function_names(list(plan.layers), taken)

    def inverse(layer: str, chunks: DeltaChunks) -> torch.Tensor:
        return by_entry(plan, layer, chunks.systems, call)

    def call(entry: str, systems: Systems) -> torch.Tensor:
        size = systems.lower.shape[-1]
        inputs = [systems.lower.reshape(1, -1, size, size)]
        if plan.layer(entry).program.inverse_ports.factored and systems.beta is not None:
            inputs.append(systems.beta.reshape(1, -1, size, 1))
        return _symbolic(names[entry], inputs).reshape(systems.lower.shape)

    return inverse


def _symbolic(name: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    result: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, dtype=torch.float32, shape=inputs[0].shape, version=1
    )
    return result


def attach_functions(
    model: onnx_ir.Model, plan: Plan, profile: Profile, taken: Collection[str] = ()
) -> list[str]:
    """Add the integer program of every layer that the model calls, and return these layers.

    The functions have the model's operator set, and none of the names that are
    ``taken`` by functions of the model itself.  The model keeps its IR version, unless
    that has no local functions; where functions have no types yet, types are left out.

    Raises
    ------
    ExportError
        If the model does not call a layer of the plan, or the profile cannot express one.
    """
    from onnx_ir.serde import deserialize_function

    called = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    names = {layer: n for layer, n in function_names(list(plan.layers), taken).items() if n in called}
    if not names:
        raise ExportError(
            "the model does not call any layer of the plan; trace it inside `with traceable(model, plan)`"
        )
    target = replace(profile, opset=model.opset_imports[""])
    model.ir_version = max(model.ir_version, LOCAL_FUNCTION_IR_VERSION)
    for layer, name in names.items():
        found = layer_function(plan.layer(layer), target, Interface(batch=None), name=name, layer=layer)
        if model.ir_version < FUNCTION_IR_VERSION:
            del found.value_info[:]
        function = deserialize_function(found)
        model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1
    model.metadata_props.update(provenance(plan, profile) | {LAYERS: str(len(names))})
    return list(names)


def opset_for(profile: Profile, opset: int | None) -> int:
    """Operator set of a whole model: the profile's, or what the caller wants.

    Raises
    ------
    ExportError
        If it is older than the profile's, or than PyTorch's exporter can write.
    """
    least = max(profile.opset, FIRST_OPSET)
    if opset is None:
        return least
    if isinstance(opset, bool) or not isinstance(opset, int) or opset < least:
        raise ExportError(f"opset {opset!r} is not {least} or later, for profile {profile.name!r}")
    return opset


@contextmanager
def without_autocast(model: torch.nn.Module) -> Iterator[None]:
    """Have a float32 model compute in float32, as its graph does, inside a ``with`` block."""
    kinds = {"cpu", device_of(model).type}
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def trace(
    module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], opset: int, **options: Any
) -> onnx_ir.Model:
    """Return ``module(**inputs)`` as PyTorch's exporter writes it, with options of `torch.onnx.export`.

    What `torch.compile` has compiled is forgotten, and compiled again at its next call.

    Raises
    ------
    ExportError
        If it cannot be traced or written, or if PyTorch has fixed a size that should be open.
    """
    require_onnx_ir()
    forget_compiled()
    try:
        with torch.no_grad(), without_autocast(module), warnings.catch_warnings(), _without_notices():
            # These warnings are PyTorch's own, about its own calls.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (),
                kwargs=dict(inputs),
                dynamo=True,
                opset_version=opset,
                verbose=False,
                **options,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        fixed = "export a fixed length (dynamic=False), or" if options.get("dynamic_shapes") else "export"
        raise ExportError(
            f"PyTorch cannot trace the model: {_first_cause(error)}; {fixed} the layers' inverses alone "
            "(qinvert.export)"
        ) from error
    assert program is not None
    _check_open_sizes(program.model, options.get("dynamic_shapes") or {})
    forget_sources(program.model)
    return program.model


def forget_compiled() -> None:
    """Have a loop over chunks traced anew.

    PyTorch would reuse the loop of an earlier trace, and its fixed sizes would become
    those of a trace of any size.
    """
    torch.compiler.reset()


def _check_open_sizes(model: onnx_ir.Model, wanted: Mapping[str, Mapping[int, Any]]) -> None:
    """Refuse sizes that PyTorch has replaced by narrower ones, like ``16*sequence``, without a word."""
    for value in model.graph.inputs:
        for axis, size in wanted.get(value.name or "", {}).items():
            found = None if value.shape is None else value.shape[axis]
            if str(getattr(found, "value", found)) != size.__name__:
                raise ExportError(
                    f"PyTorch traced size {axis} of input {value.name!r} as {found}, not as open "
                    f"{size.__name__!r}; export a fixed length (export_model(..., dynamic=False)), or the "
                    "layers' inverses alone (qinvert.export)"
                )


@contextmanager
def _without_notices() -> Iterator[None]:
    """Leave out what the exporter logs of packages and of foldings that are not needed."""
    with ExitStack() as undo:
        for name, notice in NOTICES.items():
            undo.enter_context(_without(logging.getLogger(name), notice))
        yield


@contextmanager
def _without(logger: logging.Logger, notice: str) -> Iterator[None]:
    def needed(record: logging.LogRecord) -> bool:
        return notice not in record.getMessage()

    logger.addFilter(needed)
    try:
        yield
    finally:
        logger.removeFilter(needed)


def _first_cause(error: BaseException) -> str:
    """What stopped the exporter, and the model's line if it names one; its first words are only advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    at = PLACE.search(str(error))
    return reason(error) if at is None else f"{reason(error)} ({at[1]})"


def forget_sources(model: onnx_ir.Model) -> None:
    """Drop what a trace notes about the machine and itself: equal models give equal files everywhere."""
    for node in model.graph.all_nodes():
        for key in [key for key in node.metadata_props if key.startswith(NOTES)]:
            del node.metadata_props[key]
