"""Does the ONNX graph of a whole model compute what the model computes?"""

from __future__ import annotations

import logging
import os
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import torch

from qinvert.calibration.heads import by_entry
from qinvert.calibration.patching import patched, patched_by_layer, run_model
from qinvert.delta_rule.chunks import DeltaChunks
from qinvert.errors import ExportError, InputError, reason
from qinvert.export.functions import function_names
from qinvert.export.graph import DOMAIN
from qinvert.export.interface import Interface
from qinvert.export.runtimes import RUNTIMES, Execution
from qinvert.export.runtimes.onnxruntime_cpu import open_session
from qinvert.export.verification.comparison import compare, judge
from qinvert.export.verification.references import reference
from qinvert.export.verification.tolerance import tolerance_for
from qinvert.export.whole_models.topk_ties import LowestIndexFirst
from qinvert.export.whole_models.tracing import without_autocast
from qinvert.metrics import norm_share
from qinvert.plan.plan import Plan
from qinvert.profiles import Profile
from qinvert.systems import Systems

#: Name of the first output of a whole model.
LOGITS: Final = "logits"
#: Largest difference of logits, as a share of the largest logit.  Float32 sums in another order
#: stay far below it; a branch or a mask that a trace froze is wrong by a hundredth and more.
TOLERANCE: Final = 1e-3
#: Runtime that runs the graph, and whose tolerance its inverses have.
RUNTIME: Final = "onnxruntime"
#: Name of the graph that also returns the inverses, beside the graph that is written.
WATCHED: Final = "watched.onnx"

_AT: Final = "the exported graph is not the model, at input_ids {}"
_UNCHECKED: Final = "check=False writes the graph all the same"
_REMEDY: Final = (
    "the model's code takes another path while it is traced: fix the length if it is open (dynamic=False), "
    f"or export the layers' inverses alone (qinvert.export); {_UNCHECKED}"
)

_log = logging.getLogger("qinvert")

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCheck:
    """What a graph is compared with, and where.

    The graph runs in onnxruntime and returns, beside the logits, L and T of
    every layer.  The model then runs in PyTorch with these very T: what is
    left between the logits is the order of float32 sums, however coarse the
    plan, because no rounding is decided twice.  Then every T must be what the
    simulator makes of its L, as in `qinvert.verify`.  Equal scores of sparse
    attention go to the lower index in both, see `LowestIndexFirst`.
    """

    model: torch.nn.Module
    plan: Plan
    profile: Profile
    #: Inputs of every run.
    batches: Sequence[Mapping[str, torch.Tensor]]
    #: Largest difference of logits that is allowed, as a share of the largest logit.
    tolerance: float = TOLERANCE

    def __call__(self, proto: onnx.ModelProto, folder: Path) -> None:
        """Run the graph, whose external data lie in ``folder``, and compare.

        Raises
        ------
        ExportError
            If onnxruntime cannot run it, or logits differ by more than the tolerance.
        VerificationError
            If a layer's function returns something other than the plan says.
        """
        if not can_run():
            _log.warning("the graph was not checked: onnxruntime is not installed; pip install onnxruntime")
            return
        session, outputs = _watched_session(proto, folder)
        for batch in self.batches:
            feeds = {name: value.cpu().numpy() for name, value in batch.items()}
            run = _Run.of(_run(session, outputs, feeds), proto)
            self._check_logits(batch, run)
            for name in dict.fromkeys(name for name, _ in run.seen):
                self._check_inverse(name, run)

    def _check_logits(self, batch: Mapping[str, torch.Tensor], run: _Run) -> None:
        inverse = run.inverse(self.plan)
        with patched_by_layer(self.model, inverse), LowestIndexFirst(), without_autocast(self.model):
            expected = run_model(self.model, dict(batch)).cpu()
        found = torch.from_numpy(run.logits)
        shape = list(batch["input_ids"].shape)
        if found.shape != expected.shape:
            raise ExportError(f"{_AT.format(shape)}: logits are {list(found.shape)}; {_REMEDY}")
        attended = batch.get("attention_mask", torch.ones(shape, dtype=torch.bool)).cpu().bool()
        if not attended.any():
            # Where a padded example was cut, only padding may be left.
            return
        largest = float(expected[attended].abs().amax())
        error = float((found - expected)[attended].abs().amax())
        # NaN also fails.
        if not error <= self.tolerance * largest:
            raise ExportError(
                f"{_AT.format(shape)}: logits differ by up to {error:.3g}, the largest is {largest:.3g}, the "
                f"tolerance {self.tolerance:g} of it{run.first_difference(self.tolerance)}; {_REMEDY}"
            )

    def _check_inverse(self, entry: str, run: _Run) -> None:
        """All calls of one entry of the plan against the simulator."""
        plan, names = self.plan.layer(entry), function_names(list(self.plan.layers))
        calls = [call for name, call in run.seen if name == entry]
        lower, actual = (
            np.concatenate([x.reshape(-1, plan.chunk, plan.chunk) for x in values])
            for values in ([c.lower for c in calls], [c.result for c in calls])
        )
        beta = None
        if plan.program.inverse_ports.factored:
            beta = torch.from_numpy(np.concatenate([c.beta.reshape(-1, plan.chunk) for c in calls]))
        storage = self.profile.storage_of(plan.output.format)
        systems = Systems(lower=torch.from_numpy(lower), beta=beta)
        wanted = reference(plan, Interface(batch=None), storage, systems)
        execution = Execution(setting=names[entry], outputs=[actual])
        tolerance = tolerance_for(RUNTIMES[RUNTIME], self.profile, plan, wanted.rounding)
        result = compare(RUNTIME, execution, actual, wanted, tolerance)
        judge(result, actual, wanted, tolerance, _UNCHECKED)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What one call of a local function took and returned."""

    lower: Array
    #: Empty where the program does not take beta.
    beta: Array
    result: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What one run of the graph returned."""

    logits: Array
    #: By function, in the order of the graph, which is that of the model.
    calls: Mapping[str, deque[_Call]]
    #: Calls by entry of the plan, as the model in PyTorch met them.
    seen: list[tuple[str, _Call]] = field(default_factory=list)
    #: Largest difference of L of each call, as a share of the largest element.
    differences: list[float] = field(default_factory=list)

    @staticmethod
    def of(outputs: Mapping[str, Array], proto: onnx.ModelProto) -> _Run:
        calls: dict[str, deque[_Call]] = defaultdict(deque)
        for node in _called(proto):
            lower, *beta = (outputs[name] for name in node.input)
            call = _Call(
                lower=lower,
                beta=beta[0] if beta else np.empty(0, np.float32),
                result=outputs[node.output[0]],
            )
            calls[node.op_type].append(call)
        return _Run(logits=outputs[LOGITS], calls=calls)

    def inverse(self, plan: Plan) -> Callable[[str, DeltaChunks], torch.Tensor]:
        """Return an inverse for PyTorch that returns the T of this run."""
        names = function_names(list(plan.layers))

        def returned(entry: str, systems: Systems) -> torch.Tensor:
            lower = systems.lower
            waiting = self.calls[names[entry]]
            if not waiting or waiting[0].lower.size != lower.numel():
                found = list(waiting[0].lower.shape) if waiting else "never called"
                raise ExportError(
                    f"L of {entry} in the exported graph is {found}, not {list(lower.shape)}; {_REMEDY}"
                )
            call = waiting.popleft()
            self.seen.append((entry, call))
            there = torch.from_numpy(call.lower).reshape(lower.shape)
            here = lower.to("cpu", torch.float32)
            self.differences.append(float((there - here).abs().amax() / here.abs().amax().clamp(min=1e-30)))
            return torch.from_numpy(call.result).reshape(lower.shape).to(lower.device)

        return lambda layer, chunks: by_entry(plan, layer, chunks.systems, returned)

    def first_difference(self, tolerance: float) -> str:
        """Say which layer is the first whose L differs."""
        for (entry, _), error in zip(self.seen, self.differences, strict=True):
            if not error <= tolerance:
                return f", and L of {entry} is the first that differs"
        return ""


def _called(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.domain == DOMAIN]


def _watched_session(proto: onnx.ModelProto, folder: Path) -> tuple[Any, list[str]]:
    """Open the graph with L, beta and T of every call as further outputs."""
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    known = [LOGITS]
    for name in (name for node in _called(proto) for name in (*node.input, *node.output)):
        if name not in known:
            known.append(name)
            watched.graph.output.append(
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            )
    # A file: external data are found beside it only.
    written = folder / WATCHED
    written.write_bytes(watched.SerializeToString())
    try:
        return open_session(os.fspath(written)), known
    except Exception as error:  # onnxruntime raises unrelated types here
        raise ExportError(
            f"onnxruntime cannot load the exported graph: {reason(error)}; {_REMEDY}"
        ) from error
    finally:
        written.unlink()


def _run(session: Any, outputs: list[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    try:
        return dict(zip(outputs, session.run(outputs, dict(feeds)), strict=True))
    except Exception as error:  # onnxruntime raises unrelated types here
        shape = list(feeds["input_ids"].shape)
        raise ExportError(f"{_AT.format(shape)}: onnxruntime fails: {reason(error)}; {_REMEDY}") from error


def can_run() -> bool:
    """Whether onnxruntime is installed."""
    return find_spec("onnxruntime") is not None


def random_tokens(model: torch.nn.Module, shape: Sequence[int]) -> torch.Tensor:
    """Return the same tokens of the model's vocabulary on every call."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return torch.randint(0, vocabulary, tuple(shape), generator=torch.Generator().manual_seed(0))


def difference(path: str | PathLike[str], model: torch.nn.Module, plan: Plan, length: int) -> float:
    """``||x_hat - x|| / ||x||`` of logits, x_hat by onnxruntime, x by the model under the simulated plan.

    It is measured on one sequence of random tokens.  Where the float32 sums of
    two runtimes lie on both sides of a rounding boundary, they differ by one step
    of the plan's grid, which is much more than all other differences.

    Raises
    ------
    InputError
        If the file does not run at that length.
    """
    import onnxruntime

    tokens = random_tokens(model, (1, length))
    with patched(model, plan, force=True), LowestIndexFirst(), without_autocast(model):
        expected = run_model(model, {"input_ids": tokens}).cpu()
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
        (found,) = session.run([LOGITS], {"input_ids": tokens.numpy()})
    except Exception as error:  # onnxruntime raises unrelated types here
        raise InputError(
            f"onnxruntime cannot run {os.fspath(path)} with {length} tokens: {reason(error)}"
        ) from error
    return norm_share(torch.from_numpy(found), expected)
