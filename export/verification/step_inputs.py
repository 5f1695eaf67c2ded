"""What a step graph is verified with: checked, cut into calls, and as the ports of its program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from qinvert.chunk_step.ports import (
    BETA,
    INPUTS,
    KEY,
    LOG_DECAY,
    QUERY,
    STATE,
    VALUE,
    step_sizes,
)
from qinvert.errors import InputError
from qinvert.execution.value_channels import enter
from qinvert.export.graph import Sizes
from qinvert.export.rules.step_ends import HEADS
from qinvert.export.runtimes import Feed
from qinvert.export.step_heads import one_head
from qinvert.export.step_interface import VALID, StepInterface
from qinvert.matrices import as_tensor
from qinvert.numerics.rounding import quantize
from qinvert.plan.plan import LayerPlan
from qinvert.profiles import Profile
from qinvert.program.steps import MAX_BETA, NORM_EPSILON

#: Arrays by the names of inputs; batch first.
Arrays: TypeAlias = Mapping[str, npt.NDArray[np.float32]]
#: Inputs with one number for each token.
GATES: Final = (BETA, LOG_DECAY)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepData:
    """Whole sequences in the layout of a graph, float32, padded to whole calls and to whole batches."""

    plan: LayerPlan
    interface: StepInterface
    #: Every input, `valid` included: ``[N, H, T, ..]``, ``[N, T]``, and the first state.
    arrays: Arrays

    @property
    def calls(self) -> int:
        """Calls that one sequence takes."""
        return int(self.arrays[VALID].shape[1]) // self.interface.tokens(self.plan)

    def as_taken(self, element: str) -> StepData:
        """Return the data in the type in which they enter a processor, as float32."""
        if self.interface.takes_integers:
            return self
        taken = {name: x.astype(element).astype(np.float32) for name, x in self.arrays.items()}
        return replace(self, arrays=taken)

    def cleared(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return beta and g with 0 where tokens do not count."""
        valid = self.arrays[VALID][:, None]
        found = {}
        for name in GATES:
            x = self.arrays[name]
            # Log decays of channels have one more axis, before or behind that of the tokens.
            channels = 2 if self.interface.keys_first else 3
            counts = valid if x.ndim == valid.ndim else np.expand_dims(valid, channels)
            found[name] = np.asarray(x * counts, np.float32)
        return found

    def sequences(self, profile: Profile) -> list[list[Feed]]:
        """Return the inputs of every call of every batch; only the first call has a state."""
        taken = self._stored(profile) if self.interface.takes_integers else dict(self.arrays)
        size = self.interface.batch
        starts = range(0, len(taken[QUERY]), size)
        return [[*self._calls({n: x[i : i + size] for n, x in taken.items()})] for i in starts]

    def _calls(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Iterator[Feed]:
        tokens = self.interface.tokens(self.plan)
        for i in range(self.calls):
            span = slice(i * tokens, (i + 1) * tokens)
            feed = {n: np.ascontiguousarray(x[self._cut(n, span)]) for n, x in arrays.items() if n != STATE}
            yield {**feed, STATE: arrays[STATE]} if i == 0 else feed

    def _cut(self, name: str, span: slice) -> tuple[slice, ...]:
        return *(slice(None),) * self.interface.token_axis(name, self.plan), span

    def _stored(self, profile: Profile) -> dict[str, npt.NDArray[Any]]:
        """Return what a host hands over: integers on the grids of the plan."""
        reals, found = {**self.arrays, **self.cleared(), **self.entered()}, {}
        for name in INPUTS:
            grid = self.plan.tensors[name]
            end = profile.end_of(grid.format)
            integers = quantize(torch.from_numpy(reals[name]), grid.scale, grid.format).numpy()
            found[name] = (integers + (end.zero_point - grid.format.zero_point)).astype(end.element)
        return found

    def entered(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return v and the state in the channels of the plan."""
        turn = self._turn if self.interface.values_first else lambda x: x
        reals = {name: torch.from_numpy(turn(self.arrays[name])) for name in (VALUE, STATE)}
        return {name: turn(enter(self.plan.channels, x).numpy()) for name, x in reals.items()}

    def normalized(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return q and k as the program takes them, in float64 and rounded once."""
        if not self.interface.normalize:
            return {name: self.arrays[name] for name in (QUERY, KEY)}
        found = {}
        axis = -2 if self.interface.keys_first else -1
        for name in (QUERY, KEY):
            x = self.arrays[name].astype(np.float64)
            x = x / np.sqrt((x * x).sum(axis, keepdims=True) + NORM_EPSILON)
            found[name] = (x * (x.shape[axis] ** -0.5 if name == QUERY else 1.0)).astype(np.float32)
        return found

    def ports(self, replaced: Arrays) -> dict[str, torch.Tensor]:
        """Return the ports of the program of all tokens, ``[N H, rows, columns]``.

        ``replaced`` holds what a runtime made of q, k, v or the state, in place of what is computed here.
        """
        sizes = step_sizes(self.plan.program)
        reals = {**self.arrays, **self.cleared(), **self.entered(), **self.normalized(), **replaced}
        if sizes.values_first != self.interface.values_first:
            reals |= {name: self._turn(reals[name]) for name in (VALUE, STATE)}
        if sizes.keys_first != self.interface.keys_first:
            reals |= {name: self._turn(reals[name]) for name in sizes.key_ports}
        reals[BETA] = reals[BETA][..., None, :] if sizes.values_first else reals[BETA][..., None]
        if not sizes.per_channel:
            reals[LOG_DECAY] = reals[LOG_DECAY][..., None, :]
        folded = {name: np.ascontiguousarray(reals[name]) for name in INPUTS}
        return {name: torch.from_numpy(x.reshape(-1, *x.shape[2:])) for name, x in folded.items()}

    def unfolded(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return o or a state of the program, ``[N H, rows, columns]``, with heads and in the layout."""
        whole = values.reshape(-1, self.interface.heads, *values.shape[1:])
        same = step_sizes(self.plan.program).values_first == self.interface.values_first
        return whole if same else self._turn(whole)

    @staticmethod
    def _turn(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.ascontiguousarray(np.swapaxes(x, -1, -2))


def step_data(plan: LayerPlan, interface: StepInterface, given: object) -> StepData:
    """Check what a caller gave for a step graph, and fill the last call and the last batch.

    Parameters
    ----------
    plan : LayerPlan
    interface : StepInterface
    given : mapping
        ``q, k, v, beta, g`` and ``state`` as the graph takes them, but with any number of
        sequences and of tokens; and ``valid`` ``[N, T]``, where not all tokens count.

    Raises
    ------
    InputError
        If something is missing, has a shape or values that are not legal, or needs several calls of a
        graph whose state cannot go from one to the next.
    """
    names = {*INPUTS, VALID}
    if not isinstance(given, Mapping) or not set(INPUTS) <= set(given) <= names:
        kind = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise InputError(
            f"the graph is a whole chunk step, got {kind}; pass a mapping of q, k, v, beta, g and state, and "
            "of valid where not all tokens count"
        )
    arrays = {name: _array(name, given[name]) for name in given}
    if VALID not in arrays:
        arrays[VALID] = np.ones((len(arrays[BETA]), *arrays[BETA].shape[2:3]), np.float32)
    _check_shapes(plan, interface, arrays)
    _check_values(arrays)
    data = StepData(plan=plan, interface=interface, arrays=arrays)
    data = StepData(plan=plan, interface=interface, arrays=_filled(data))
    if data.calls > 1 and not interface.hands_on:
        raise InputError(
            f"the graph takes or returns the state as integers, but not both, so that no runtime can hand it "
            f"from call to call; pass at most {interface.tokens(plan)} tokens"
        )
    return data


def split_data(data: StepData, plans: Sequence[LayerPlan]) -> tuple[StepData, ...]:
    """Return the data beside its plan, or those of each head where heads have plans of their own."""
    if len(plans) == 1:
        return (data,)
    alone = one_head(data.interface)
    return tuple(
        StepData(plan=plan, interface=alone, arrays=one_head_of(data.arrays, i))
        for i, plan in enumerate(plans)
    )


def one_head_of(arrays: Mapping[str, npt.NDArray[Any]], head: int) -> dict[str, npt.NDArray[Any]]:
    """Return inputs or outputs of one head, with its axis; which tokens count is the same for all."""
    return {name: x if name == VALID else x[:, head : head + 1] for name, x in arrays.items()}


def joined_heads(each: Sequence[Mapping[str, npt.NDArray[Any]]]) -> dict[str, npt.NDArray[Any]]:
    """Return inputs of all heads, of those of each: the inverse of `one_head_of`."""
    return {
        name: x if name == VALID else np.concatenate([own[name] for own in each], axis=HEADS)
        for name, x in each[0].items()
    }


def _array(name: str, value: object) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = as_tensor(value, name).detach().cpu().to(torch.float32).numpy()
    return found


def _check_shapes(plan: LayerPlan, interface: StepInterface, arrays: Arrays) -> None:
    count, tokens = (*arrays[BETA].shape, 0, 0, 0)[0:3:2]
    found = {name: list(x.shape) for name, x in arrays.items()}
    own: Sizes = [interface.batch, interface.tokens(plan)]
    wanted = {VALID: own, **interface.inputs(plan)}
    for name, shape in wanted.items():
        shape[0] = count
        if name != STATE:
            shape[interface.token_axis(name, plan)] = tokens
        if found[name] != shape or not count or not tokens:
            raise InputError(
                f"{name} has the shape {found[name]}; pass {interface.inputs(plan).get(name, shape)} with "
                "any number of sequences and of tokens, the same for all inputs"
            )


def _check_values(arrays: Arrays) -> None:
    for name, x in arrays.items():
        if not np.isfinite(x).all():
            raise InputError(f"{name} holds NaN or Inf values; look for them upstream")
    if (arrays[LOG_DECAY] > 0).any():
        raise InputError("g holds positive numbers; log decays are at most 0")
    if ((arrays[BETA] < 0) | (arrays[BETA] > MAX_BETA)).any():
        raise InputError(f"beta is not in [0, {MAX_BETA:g}]; pass it after its sigmoid")
    if not np.isin(arrays[VALID], (0, 1)).all():
        raise InputError("valid holds other numbers than 0 and 1; pass 1 for tokens and 0 for padding")


def _filled(data: StepData) -> dict[str, npt.NDArray[np.float32]]:
    """Repeat sequences to whole batches, and pad tokens that do not count to whole calls."""
    size, tokens = data.interface.batch, data.interface.tokens(data.plan)
    count, given = data.arrays[VALID].shape
    taken, missing = np.arange(-(-count // size) * size) % count, -given % tokens
    found = {}
    for name, x in data.arrays.items():
        x = x[taken]
        if name != STATE:
            axis = data._cut(name, slice(0)).index(slice(0))
            x = np.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
        found[name] = x
    return found
