"""What a step graph should return, and how what it returned compares with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from qinvert.chunk_step.ports import OUTPUT
from qinvert.errors import ExportError
from qinvert.execution.value_channels import enter, leave
from qinvert.export.runtimes import Feed
from qinvert.export.step_interface import STATE_OUT
from qinvert.export.verification.step_inputs import Arrays, StepData
from qinvert.export.verification.step_rollout import run_chunks, run_chunks_exactly
from qinvert.export.verification.tolerance import Steps
from qinvert.numerics.rounding import dequantize
from qinvert.profiles import Profile

Array = npt.NDArray[Any]


#: Axis of the heads, before tokens and channels.
HEADS: Final = -3


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReference:
    """The simulator's integers of every output of every call, and what they stand for."""

    data: StepData
    profile: Profile
    #: Integers by output and call, ``[N, H, .., ..]`` in the layout of the graph.
    integers: Mapping[str, Sequence[Array]]
    #: The same in float64, without any rounding.
    truth: Mapping[str, Sequence[Array]]

    @property
    def rotated(self) -> bool:
        """Whether what the graph returns was rotated in float, so that its bits depend on an order."""
        return self.data.plan.channels is not None and self.data.plan.channels.rotated and self._by_graph

    @property
    def _by_graph(self) -> bool:
        return not self.data.interface.returns_integers

    def expected(self, output: str) -> Array:
        """Return what the graph should return of an output, calls one after the other."""
        tensor = self.data.interface.tensor_of(self.data.plan, output)
        grid, integers = self.data.plan.tensors[tensor], np.stack(self.integers[output])
        if not self._by_graph:
            end = self.profile.end_of(grid.format)
            return (integers + (end.zero_point - grid.format.zero_point)).astype(end.element)
        reals = dequantize(torch.from_numpy(integers), grid.scale, grid.format).numpy()
        return self._left(reals)

    def steps(self, output: str, actual: Array) -> Steps:
        """Return the differences of what a graph returned, in steps of the output's grid."""
        if not self._by_graph:
            steps = np.abs(actual.astype(np.float64) - self.expected(output))
            return np.asarray(steps / self._unit(output))
        if not self.rotated:
            wanted = self._in_steps(output, self.expected(output))
        else:
            wanted = np.stack(self.integers[output]) / self._unit(output)
        return np.asarray(np.abs(self._in_steps(output, actual) - wanted))

    def _unit(self, output: str) -> float:
        """How much of what is returned is one step."""
        returned = self.data.plan.tensors[self.data.interface.tensor_of(self.data.plan, output)]
        return self.data.interface.grid_of(self.data.plan, output).scale / returned.scale

    def reals(self, output: str, actual: Array) -> Array:
        """Return the real values of what a graph returned."""
        if self._by_graph:
            return actual
        grid = self.data.plan.tensors[self.data.interface.tensor_of(self.data.plan, output)]
        end = self.profile.end_of(grid.format)
        integers = (actual.astype(np.float32) - end.zero_point) * np.float32(grid.scale)
        return self._left(integers)

    def true_reals(self, output: str) -> Array:
        """Return what the rule itself gives, without any rounding."""
        # Not by NumPy, which warns of what float32 does not hold.
        exact = torch.from_numpy(np.stack(self.truth[output])).to(torch.float32)
        return self._left(exact.numpy())

    def _in_steps(self, output: str, reals: Array) -> Array:
        grid = self.data.interface.grid_of(self.data.plan, output)
        values = self._turned(torch.from_numpy(reals.astype(np.float64)))
        entered = self._turned(enter(self.data.plan.channels, values, HEADS))
        return np.asarray(entered.numpy() / grid.scale)

    def _left(self, reals: Array) -> Array:
        """Values as the graph returns them, of values in the channels of the plan."""
        values = self._turned(torch.from_numpy(reals))
        return np.asarray(self._turned(leave(self.data.plan.channels, values, HEADS)).numpy())

    def _turned(self, values: torch.Tensor) -> torch.Tensor:
        """Values in the last axis, or back."""
        return values.mT if self.data.interface.values_first else values


def step_reference(data: StepData, profile: Profile, replaced: Arrays) -> StepReference:
    """Simulate all calls, the state carried as integers from chunk to chunk."""
    ports = data.ports(replaced)
    return StepReference(
        data=data,
        profile=profile,
        integers=_by_output(data, *run_chunks(data.plan, ports, data.interface.chunks)),
        truth=_by_output(data, *run_chunks_exactly(data.plan, data.ports({}))),
    )


def _by_output(data: StepData, o: torch.Tensor, states: list[torch.Tensor]) -> dict[str, list[Array]]:
    whole, chunks = data.unfolded(o.cpu().numpy()), data.interface.chunks
    behind = [data.unfolded(state.cpu().numpy()) for state in states]
    found: dict[str, list[Array]] = {}
    for i, name in enumerate(data.interface.outputs(data.plan)):
        if name == OUTPUT:
            axis = 3 if data.interface.values_first else 2
            found[name] = np.split(whole, data.calls, axis=axis)
        else:
            first = chunks - 1 if name == STATE_OUT else i - 1
            found[name] = behind[first::chunks]
    return found


def joined_outputs(sequences: Sequence[Sequence[Feed]], reference: StepReference) -> dict[str, Array]:
    """Return every output of all sequences, ``[calls, N, H, .., ..]``.

    Raises
    ------
    ExportError
        If it has another type or shape than is expected.
    """
    found = {}
    for name in reference.integers:
        calls = zip(*sequences, strict=True)
        whole = np.stack([np.concatenate([result[name] for result in call]) for call in calls])
        wanted = reference.expected(name)
        if whole.shape != wanted.shape or whole.dtype != wanted.dtype:
            raise ExportError(
                f"the graph returned {name} as {whole.dtype} {list(whole.shape[1:])}, not {wanted.dtype} "
                f"{list(wanted.shape[1:])}; export it again"
            )
        found[name] = whole
    return found
