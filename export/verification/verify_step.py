"""Runs the graph of a chunk step call after call, and compares every value with the simulator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import onnx
import onnx.utils
import torch

from qinvert.chunk_step.ports import KEY, QUERY, STATE, VALUE
from qinvert.errors import ExportError, VerificationError, lookup
from qinvert.export.exporting import serialize
from qinvert.export.rules.step_ends import HEAD
from qinvert.export.runtimes import RUNTIMES, Execution, Feed, Runtime, execute_sequences
from qinvert.export.step_ends import NORMALIZED, ROTATED, SCALED
from qinvert.export.step_interface import STATE_OUT, StepInterface
from qinvert.export.verification.comparison import Verification, is_allowed, measured, refusal
from qinvert.export.verification.step_inputs import (
    Arrays,
    StepData,
    joined_heads,
    one_head_of,
    split_data,
    step_data,
)
from qinvert.export.verification.step_reference import StepReference, joined_outputs, step_reference
from qinvert.export.verification.tolerance import (
    FLOAT_PRODUCT_SHARE,
    HALF_STEP,
    KEYS_TOLERANCE,
    NOISE,
    Tolerance,
    is_exact,
)
from qinvert.metrics import NoiseStatistics
from qinvert.numerics.law import Rounding
from qinvert.plan.plan import LayerPlan
from qinvert.profiles import Profile

#: Steps of an 8-bit grid by which a rare value may differ, where one of the key path fell on the other
#: side of a tie and multiplied many values; on a 16-bit grid it is as much in real units.
TIE_STEPS: Final = 2
#: Steps of a 16-bit grid that float32 products of such tensors may be off.
WIDE_STEPS: Final = 8
#: How many times these steps the largest such difference may reach: states carry it on.
TIE_TIMES: Final = 16
#: Share of the values to which that may happen.
TIE_SHARE: Final = FLOAT_PRODUCT_SHARE
#: Steps of an 8-bit grid by which any value may differ on a processor with its own rounding: one of the
#: key path multiplies many values, and states carry it on. Another program differs by a share of the range.
OWN_STEPS: Final = 8
#: How many times these steps the largest difference may reach, in the share of values of ties.
OWN_TIMES: Final = 4


def verify_step(
    model: onnx.ModelProto,
    content: bytes,
    plans: Sequence[LayerPlan],
    interface: StepInterface,
    profile: Profile,
    given: object,
    runtimes: Sequence[str],
    hint: str,
) -> list[Verification]:
    """Compare a step graph with the simulator in every setting of some runtimes.

    ``plans`` are those of `qinvert.export.step_heads.layer_plans`: one, or one for each head.

    Tokens beyond those of one call run in further calls.  The state goes from
    each to the next as the runtime returned it, and in the simulator as integers.

    Returns
    -------
    list of Verification
        One for each runtime, setting, plan and output.

    Raises
    ------
    VerificationError
        If a difference is not allowed.
    ExportError
        If a runtime is unknown, refuses the graph, or cannot hand a state on.
    InputError
        If ``given`` is not legal.
    """
    parts = split_data(step_data(plans[0], interface, given), plans)
    check = _StepCheck(model=model, content=content, parts=parts, profile=profile, hint=hint)
    return [result for name in runtimes for result in check.run(name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepCheck:
    """A step graph, and the sequences that every runtime is compared on."""

    model: onnx.ModelProto
    content: bytes
    #: The data of all heads, or those of each head beside its plan.
    parts: tuple[StepData, ...]
    profile: Profile
    #: The end of the message of a refusal.
    hint: str
    #: The references that hold for every setting, by the type of the inputs, once they are simulated.
    simulated: dict[str, list[StepReference]] = field(default_factory=dict)

    def run(self, name: str) -> Iterator[Verification]:
        """Run the graph in every setting of a runtime, and judge every output."""
        runtime = lookup(RUNTIMES, name, "runtime", ExportError)
        check = replace(self, parts=tuple(part.as_taken(runtime.inputs) for part in self.parts))
        made = check._made_by(runtime)
        for execution in execute_sequences(runtime.name, self.content, check._feeds(), {STATE_OUT: STATE}):
            references = check._references(runtime.inputs, made.get(execution.setting))
            for i, reference in enumerate(references):
                sequences = self._part_of(execution.sequences, i)
                for output, actual in joined_outputs(sequences, reference).items():
                    label = f"{runtime.name} ({execution.setting}) {output}{self._of_head(i)}"
                    yield check._judged(runtime, execution, reference, output, actual, label)

    def _feeds(self) -> list[list[Feed]]:
        """The inputs of every call of the whole graph."""
        each = [part.sequences(self.profile) for part in self.parts]
        return [[joined_heads(calls) for calls in zip(*row, strict=True)] for row in zip(*each, strict=True)]

    def _part_of(self, sequences: Sequence[Sequence[Feed]], index: int) -> Sequence[Sequence[Feed]]:
        if len(self.parts) == 1:
            return sequences
        return [[one_head_of(feed, index) for feed in calls] for calls in sequences]

    def _of_head(self, index: int) -> str:
        return f" of head {index}" if len(self.parts) > 1 else ""

    def _references(self, inputs: str, made: Sequence[Arrays] | None) -> list[StepReference]:
        if made is not None:
            return self._simulated(made)
        if inputs not in self.simulated:
            self.simulated[inputs] = self._simulated([{}] * len(self.parts))
        return self.simulated[inputs]

    def _simulated(self, made: Sequence[Arrays]) -> list[StepReference]:
        return [step_reference(part, self.profile, own) for part, own in zip(self.parts, made, strict=True)]

    def _judged(
        self,
        runtime: Runtime,
        execution: Execution,
        reference: StepReference,
        output: str,
        actual: Any,
        label: str,
    ) -> Verification:
        data = reference.data
        noise = NoiseStatistics()
        noise.update(
            torch.from_numpy(reference.reals(output, actual)), torch.from_numpy(reference.true_reals(output))
        )
        wide = data.interface.grid_of(data.plan, output).format.is_wide
        tolerance = step_tolerance(
            runtime, self.profile, data.plan, not _float_ends(data), reference.rotated, wide
        )
        steps = reference.steps(output, actual)
        result = measured(
            label,
            execution,
            steps,
            None,
            tolerance,
            Rounding.ONNX,
            noise.sqnr_db,
        )
        if not is_allowed(result, tolerance):
            blamed = tolerance.blames(steps)
            # Too many values may differ by little.
            blamed = blamed if blamed.any() else tolerance.counts(steps)
            raise refusal(result, blamed, actual, reference.expected(output), self.hint)
        return result

    def _made_by(self, runtime: Runtime) -> dict[str, list[dict[str, Any]]]:
        """What each setting of a runtime makes of the inputs in float, by part: the simulator goes on."""
        ends = [
            {port: self._tensor(i, tensor) for port, tensor in _float_ends(part).items()}
            for i, part in enumerate(self.parts)
        ]
        if not any(ends):
            return {}
        part = serialize(_part(self.model, [tensor for own in ends for tensor in own.values()]))
        feeds = self._feeds()
        # Every call takes the first state here, whose rotation is all that is asked for.
        feeds = [[{STATE: calls[0][STATE], **feed} for feed in calls] for calls in feeds]
        found = {}
        for execution in execute_sequences(runtime.name, part, feeds, {}):
            found[execution.setting] = [
                {port: _joined(data, execution, port, tensor) for port, tensor in own.items()}
                for data, own in zip(self.parts, ends, strict=True)
            ]
            for data, made in zip(self.parts, found[execution.setting], strict=True):
                _check_made(data, runtime, execution.setting, made)
        return found

    def _tensor(self, index: int, name: str) -> str:
        """What the graph calls a tensor of one part."""
        return HEAD.format(index) + name if len(self.parts) > 1 else name


def _float_ends(data: StepData) -> dict[str, str]:
    """Tensors that the graph computes by sums in float, by the port that they become."""
    interface, channels = data.interface, data.plan.channels
    found: dict[str, str] = {}
    if interface.normalize:
        found |= {QUERY: SCALED.format(QUERY), KEY: NORMALIZED.format(KEY)}
    if channels is not None and channels.rotated and not interface.takes_integers:
        found |= {name: ROTATED.format(name) for name in (VALUE, STATE)}
    return found


def _joined(data: StepData, execution: Execution, port: str, tensor: str) -> Any:
    axis = data.interface.token_axis(port, data.plan)
    rows = [
        calls[0][tensor] if port == STATE else np.concatenate([call[tensor] for call in calls], axis=axis)
        for calls in execution.sequences
    ]
    return np.concatenate(rows)


def _check_made(data: StepData, runtime: Runtime, setting: str, made: dict[str, Any]) -> None:
    expected = {**data.normalized(), **data.entered()}
    for port, values in made.items():
        error = float(np.abs(values - expected[port]).max())
        # NaN fails.
        if not error <= KEYS_TOLERANCE[runtime.inputs] * max(1.0, float(np.abs(expected[port]).max())):
            raise VerificationError(
                f"{runtime.name} ({setting}) computes {port} with an error of {error:.3g} before it is "
                f"quantized; run float operators in {runtime.inputs}"
            )


def _part(model: onnx.ModelProto, tensors: list[str]) -> onnx.ModelProto:
    written = {node.output[0] for node in model.graph.node}
    missing = [name for name in tensors if name not in written]
    if missing:
        raise ExportError(f"the graph has no tensor {missing[0]!r}; export it again")
    return onnx.utils.Extractor(model).extract_model([value.name for value in model.graph.input], tensors)


def step_tolerance(
    runtime: Runtime, profile: Profile, plan: LayerPlan, exact_ends: bool, rotated: bool, wide: bool
) -> Tolerance:
    """Choose what a runtime is allowed for an output of a step graph.

    Parameters
    ----------
    runtime : Runtime
        It knows whether the processor has its own rounding, and whether it reorders float operators.
    profile : Profile
    plan : LayerPlan
    exact_ends : bool
        Whether nothing is summed in float before it is quantized.
    rotated : bool
        Whether the output is summed in float after it was dequantized: half a step tells integers apart.
    wide : bool
        Whether the output's grid has 16 bits.
    """
    if runtime.own_steps:
        return own_tolerance(wide)
    counted_from = HALF_STEP if rotated else NOISE if runtime.reorders else 0.0
    # Two roundings of a product and a sum in float32 may become one.
    fuses = runtime.reorders and plan.tensors[STATE].format.is_float
    if is_exact(profile, plan) and exact_ends and not fuses:
        return Tolerance.of_equality(counted_from)
    return Tolerance(
        counted_from=counted_from or NOISE,
        share=1.0 if wide else TIE_SHARE,
        steps=WIDE_STEPS if wide else TIE_STEPS,
        share_beyond=TIE_SHARE,
        times_beyond=TIE_TIMES * (TIE_STEPS * 256 // WIDE_STEPS if wide else 1),
    )


def own_tolerance(wide: bool) -> Tolerance:
    """Return what a processor with its own rounding is allowed: its state carries differences on."""
    return Tolerance(
        counted_from=HALF_STEP,
        share=1.0,
        steps=OWN_STEPS * (256 if wide else 1),
        share_beyond=TIE_SHARE,
        times_beyond=OWN_TIMES,
    )
