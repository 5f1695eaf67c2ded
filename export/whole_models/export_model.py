"""`qinvert.export_model`: a whole decoder as ONNX, with a local function for every layer's inverse."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import onnx
import torch

from qinvert.calibration.data.token_batches import token_batches
from qinvert.calibration.model_identity import check_identity
from qinvert.calibration.patching import by_layer
from qinvert.checks import check_magnitude
from qinvert.errors import ExportError, InputError
from qinvert.export.exporting import profile_for, serialize
from qinvert.export.graph import MAX_BYTES
from qinvert.export.graph import check as check_model
from qinvert.export.open_shapes import check_file
from qinvert.export.whole_models.check import LOGITS, TOLERANCE, ModelCheck, random_tokens
from qinvert.export.whole_models.tracing import attach_functions, opset_for, require_onnx_ir, trace, traceable
from qinvert.files import check_target, make_folder, refusals, write_atomically
from qinvert.plan.plan import Plan
from qinvert.pretrained import opened
from qinvert.temporaries import GRACE, scratch_folder, temporary_folder

if TYPE_CHECKING:
    import onnx_ir

#: Examines a model, whose external data lie in a folder, before it is written to its path.
Examine: TypeAlias = Callable[[onnx.ModelProto, Path], None]

#: End of the names of files with weights; before it stand the model's name and a random part.
DATA_SUFFIX: Final = ".data"
#: Names of the open axes.
BATCH: Final = "batch"
SEQUENCE: Final = "sequence"
#: Length of what an open length is traced with.
EXAMPLE_CHUNKS: Final = 3
#: Experts of this kind are written as plain MatMuls; others are operators without an ONNX form.
EXPERTS: Final = "batched_mm"


def export_model(
    model: torch.nn.Module | str | PathLike[str],
    plan: Plan,
    example: Any,
    path: str | PathLike[str],
    *,
    profile: str | None = None,
    dynamic: bool = True,
    opset: int | None = None,
    check: bool = True,
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> onnx.ModelProto:
    """Write a decoder whose delta-rule layers call their integer program: ``input_ids -> logits``.

    Every layer calls a local function ``TriInv_LAYER`` of the domain
    ``qinvert``, which maps ``L [1, matrices, C, C]`` to T; what stands around
    it, L included, is float32.  The chunks of a layer are one Scan, so that
    the graph holds for every sequence length.  onnxruntime runs the file as
    it is; `onnx.inliner.inline_local_functions` makes it one graph of plain
    operators.  The cache is left out: the graph is that of a prefill.

    Parameters
    ----------
    model : torch.nn.Module or path
        A float32 Hugging Face model with delta-rule layers, or its folder.
    plan : Plan
        Plan of this model.
    example
        Inputs to trace with: token ids ``[batch, length]``, or a dict of
        tensors of that shape, ``input_ids`` among them.
    path : path
        Path of the .onnx file, which is written atomically.  Weights beyond 1 GiB go to
        a file ``PATH.XXXXXXXX.data`` beside it, with a new name each time: the old model keeps
        its weights until it is replaced, and they are deleted by the next export.
    profile : str, optional
        Export profile of the functions; the plan's target if left out.
    dynamic : bool
        Leave batch and length open.  False fixes both as the example has
        them, as compilers for NPUs want; tracing then takes half the time.
    opset : int, optional
        Operator set of the model and its functions; the profile's, but at
        least 18, if left out.
    check : bool
        Run the graph in onnxruntime before it is written, and refuse it if it
        is not the model under the simulated plan: on random tokens of the
        example's shape and, where the length is open, on sequences of one
        token, of a chunk and one token, and of more chunks than were traced;
        see `qinvert.export.whole_models.check.ModelCheck`.  It costs a forward
        pass of both for each (one second of ten for small models), and memory
        for the weights once more and for L and T of all layers.  Without
        onnxruntime a warning is logged instead.
    tolerance : float
        Largest difference of logits that is allowed, as a share of the largest logit.
    force : bool
        Go on with another model than the one that the plan was made for.

    Returns
    -------
    onnx.ModelProto
        The model that was written.

    Raises
    ------
    InputError
        If the model has no such layer, or the example does not fit.
    PlanError
        If the plan lacks a layer of the model, or was made for another model.
    ExportError
        If the profile cannot express the plan, PyTorch cannot trace the model,
        or the graph computes something else; nothing is written then.
    VerificationError
        If a layer's function does not return in onnxruntime what the plan says.
    MissingDependencyError
        If onnxscript is not installed.
    """
    require_onnx_ir()
    chosen = profile_for(plan, profile)
    check_magnitude("tolerance", tolerance, InputError, "pass for example 1e-3")
    check_target(path)
    loaded = opened(model)
    if isinstance(loaded, torch.nn.Module):
        check_float32(loaded)
    by_layer(loaded, plan)
    check_identity(plan, loaded, force)
    given = inputs = _inputs(loaded, example)
    shapes = None
    if dynamic:
        inputs = _stretched(given, 2, EXAMPLE_CHUNKS * chunk_of(plan))
        shapes = {name: {0: torch.export.Dim(BATCH), 1: torch.export.Dim(SEQUENCE)} for name in inputs}
    number = opset_for(chosen, opset)
    with without_cache(loaded), plain_experts(loaded), traceable(loaded, plan):
        traced = trace(loaded, inputs, number, dynamic_shapes=shapes, output_names=[LOGITS])
    attach_functions(traced, plan, chosen)
    if not check:
        return save(traced, path)
    batches = _untraced(loaded, given, untraced_lengths(plan) if dynamic else ())
    compare = ModelCheck(model=loaded, plan=plan, profile=chosen, batches=batches, tolerance=tolerance)
    with without_cache(loaded):
        return save(traced, path, compare)


def check_float32(model: torch.nn.Module) -> None:
    """Refuse weights of 16 bits, which a trace would carry into the float32 functions."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise InputError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}, but only float32 models can be "
                "exported; pass model.float()"
            )


def untraced_lengths(plan: Plan) -> tuple[int, ...]:
    """Lengths at which a graph of any length must be right: shorter and longer than the traced one."""
    return 1, chunk_of(plan) + 1, EXAMPLE_CHUNKS * chunk_of(plan) + 8


def _inputs(model: torch.nn.Module, example: Any) -> dict[str, torch.Tensor]:
    batch = next(token_batches(example))
    shape, device = batch["input_ids"].shape, next(model.parameters()).device
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            given = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise InputError(
                f"{name} of the example is {given}; pass tensors of input_ids' shape {list(shape)}"
            )
    return {name: value.to(device) for name, value in batch.items()}


def chunk_of(plan: Plan) -> int:
    """Size of the plan's matrices."""
    return next(iter(plan.layers.values())).chunk


def _untraced(
    model: torch.nn.Module, example: dict[str, torch.Tensor], lengths: Sequence[int]
) -> list[dict[str, torch.Tensor]]:
    """Inputs like the example, and like one sequence of it at other lengths, with random tokens."""
    batches = [example, *(_stretched(example, 1, length) for length in lengths)]
    return [{**batch, "input_ids": random_tokens(model, batch["input_ids"].shape)} for batch in batches]


def _stretched(inputs: dict[str, torch.Tensor], count: int, length: int) -> dict[str, torch.Tensor]:
    """Repeat or cut the first sequence of an example.

    Two sequences of whole chunks are what an open length is traced with: a trace takes a
    size of 1 for a constant, and padding of this very example for a rule.
    """
    return {name: x[:1].repeat(count, -(-length // x.shape[1]))[:, :length] for name, x in inputs.items()}


@contextmanager
def without_cache(model: torch.nn.Module) -> Iterator[None]:
    """Configure the model to return no cache, inside a ``with`` block."""
    with ExitStack() as undo:
        for module in model.modules():
            config = getattr(module, "config", None)
            if getattr(config, "use_cache", False):
                undo.callback(setattr, config, "use_cache", True)
                setattr(config, "use_cache", False)  # noqa: B010 - configurations are untyped
        yield


@contextmanager
def plain_experts(model: Any) -> Iterator[None]:
    """Have a mixture of experts run as plain products, inside a ``with`` block."""
    if not getattr(model, "_can_set_experts_implementation", lambda: False)():
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation(EXPERTS)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def save(
    model: onnx_ir.Model,
    path: str | PathLike[str],
    examine: Examine | None = None,
    kept: Collection[str] = (),
) -> onnx.ModelProto:
    """Check a model and write it, with the weights in a second file where protobuf's limit demands it.

    Parameters
    ----------
    model : onnx_ir.Model
    path : path
    examine : callable, optional
        If it raises, nothing is written at ``path``.
    kept : collection of str
        Files that another model needs, by their real paths, whatever they are called.

    Raises
    ------
    ExportError
        If onnx finds it illegal.
    InputError
        If it cannot be written.
    """
    from onnx_ir.serde import serialize_model

    weights = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value
    )
    if weights > MAX_BYTES:
        return _save_beside(model, Path(path), examine, kept)
    proto: onnx.ModelProto = serialize_model(model)
    check_model(proto)
    if examine is not None:
        with scratch_folder() as folder:
            examine(proto, folder)
    write_atomically(path, serialize(proto))
    _forget_weights(Path(os.path.realpath(path)), kept)
    return proto


def _save_beside(
    model: onnx_ir.Model, path: Path, examine: Examine | None, kept: Collection[str]
) -> onnx.ModelProto:
    """Write the weights under a name of their own, then switch the model to them by one rename.

    A process that is killed before the rename leaves the old model with its old weights.
    """
    import onnx_ir

    path = Path(os.path.realpath(path))
    make_folder(path.parent)
    data = f"{path.name}.{secrets.token_hex(4)}{DATA_SUFFIX}"
    with ExitStack() as undo:
        with refusals(path):
            folder = undo.enter_context(temporary_folder(path))
            written = folder / path.name
            onnx_ir.save(model, written, external_data=data)
        try:
            check_file(written)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"onnx refuses the exported graph: {error}") from error
        proto = onnx.load(os.fspath(written), load_external_data=False)
        if examine is not None:
            examine(proto, folder)
        with refusals(path):
            _switch(folder, path, data)
    _forget_weights(path, {*kept, os.fspath(path.parent / data)})
    return proto


def _switch(folder: Path, path: Path, data: str) -> None:
    """Rename weights to ``data`` beside ``path``, and then the model to ``path``."""
    # Weights that are young are never forgotten by others, however long the examination took.
    os.utime(folder / data)
    os.replace(folder / data, path.parent / data)
    try:
        os.replace(folder / path.name, path)
    except OSError:
        (path.parent / data).unlink(missing_ok=True)
        raise


def _forget_weights(path: Path, kept: Collection[str]) -> None:
    """Delete weights that earlier exports wrote for a model of this name.

    New ones may be those of another process, whose model is about to follow.
    """
    pattern = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}{re.escape(DATA_SUFFIX)}")
    for other in path.parent.iterdir():
        old = pattern.fullmatch(other.name) and os.path.realpath(other) not in kept
        if old and time.time() - other.stat().st_mtime > GRACE:
            other.unlink(missing_ok=True)
