"""``max|x|`` of every tensor of a program, over all matrices seen; matrices of many layers run together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import torch

from qinvert.execution.floating import evaluate
from qinvert.program.program import Program
from qinvert.program.steps import MOVES

#: Matrices that programs run on at once, on a device.
AT_ONCE: Final = 1024
#: On a CPU, where the values of a step should stay in its cache.
ON_CPU: Final = 64
#: Real values ``[batch, rows, columns]`` of every input port.
Inputs: TypeAlias = Mapping[str, torch.Tensor]


class RangeObserver:
    """``max|x|`` of every tensor of a program, over all matrices seen.

    Programs run in float32 on unquantized input.  A value that overflows
    makes the range infinite.  Slices, masks and concats get the range of
    their sources, whose grid they share.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        #: max|x| per tensor so far.
        self.ranges = dict.fromkeys(program.tensors, 0.0)
        self._moves = [step for step in program.steps if isinstance(step, MOVES)]

    def update(self, inputs: Inputs) -> None:
        """Add real values of every input port."""
        found = magnitudes(self.program, inputs)
        self.raise_to({name: float(each.max()) for name, each in found.items()})

    def raise_to(self, largest: Mapping[str, float]) -> None:
        """Add the largest magnitudes of the tensors that steps compute."""
        for name, value in largest.items():
            # max() would lose a NaN; powers give NaN as inf - inf.
            self.ranges[name] = max(self.ranges[name], math.inf if math.isnan(value) else value)
        for step in self._moves:
            sources = (self.ranges[name] for name in step.inputs if name in self.ranges)
            self.ranges[step.output] = max(sources)


def magnitudes(program: Program, inputs: Inputs) -> dict[str, np.ndarray]:
    """Return ``max|x|`` of every matrix, float32 ``[batch]``, for every tensor that is not moved.

    A NaN stays one.
    """
    moved = {step.output for step in program.steps if isinstance(step, MOVES)}
    batch = len(next(iter(inputs.values())))
    found: dict[str, torch.Tensor] = {}

    def observe(name: str, tensor: torch.Tensor) -> None:
        if name not in moved:
            each = tensor.reshape(-1, batch, tensor.shape[-2] * tensor.shape[-1])
            # One axis at a time: reductions over two that are apart are slow.
            found[name] = torch.maximum(each.amax(2).amax(0), -each.amin(2).amin(0))

    evaluate(program, inputs, torch.float32, observe)
    # One transfer: a device would wait for the host once for every tensor.
    return dict(zip(found, torch.stack(list(found.values())).cpu().numpy(), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Waiting:
    """Matrices of one layer, and the observers of the programs that are to run on them."""

    observers: Sequence[RangeObserver]
    inputs: Inputs

    @property
    def count(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def kind(self) -> tuple[object, ...]:
        """What entries share that run together: the programs themselves, and the device."""
        programs = (id(observer.program) for observer in self.observers)
        return (next(iter(self.inputs.values())).device, *programs)


class RangeQueue:
    """Matrices that wait until programs run on those of all layers at once.

    A program on a device costs as much for a few matrices as for a thousand.
    """

    def __init__(self, capacity: int = AT_ONCE) -> None:
        self._capacity = capacity
        self._waiting: list[_Waiting] = []

    def add(self, observers: Sequence[RangeObserver], inputs: Inputs) -> None:
        """Queue matrices; programs run once there are enough of them."""
        self._waiting.append(_Waiting(observers=observers, inputs=inputs))
        if sum(entry.count for entry in self._waiting) >= self._capacity:
            self.flush()

    def flush(self) -> None:
        """Run the programs on everything that waits."""
        alike: dict[tuple[object, ...], list[_Waiting]] = {}
        for entry in self._waiting:
            alike.setdefault(entry.kind, []).append(entry)
        self._waiting = []
        for entries in alike.values():
            _run(entries)


def _run(entries: Sequence[_Waiting]) -> None:
    observers = entries[0].observers
    counts = [entry.count for entry in entries]
    starts = np.cumsum([0, *counts[:-1]])
    blocks = list(_blocks({name: [e.inputs[name] for e in entries] for name in entries[0].inputs}))
    for number, observer in enumerate(observers):
        found = [magnitudes(observer.program, block) for block in blocks]
        # Of every entry; what fills the last block up comes behind all of them.
        largest = {
            name: np.maximum.reduceat(np.concatenate([x[name] for x in found])[: sum(counts)], starts)
            for name in found[0]
        }
        for i, entry in enumerate(entries):
            entry.observers[number].raise_to({name: float(values[i]) for name, values in largest.items()})


def _blocks(inputs: Mapping[str, Sequence[torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    joined = {name: torch.cat(list(parts)) for name, parts in inputs.items()}
    first = next(iter(joined.values()))
    if first.device.type == "cpu":
        size, index = ON_CPU, torch.arange(len(first))
    else:
        # What kernels a device takes may depend on the number of matrices, so that it is always the same.
        size = AT_ONCE
        index = torch.arange(-(-len(first) // size) * size, device=first.device) % len(first)
    for part in torch.split(index, size):
        yield {name: values[part] for name, values in joined.items()}
