"""Streaming statistics: memory depends on the program, never on the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from qinvert.calibration.heads import NO_HEAD
from qinvert.calibration.observation.ranges import RangeObserver, RangeQueue
from qinvert.errors import InputError
from qinvert.execution.inputs import program_inputs
from qinvert.program.program import Program
from qinvert.systems import Systems

#: Candidates run on every one of this many first matrices of a layer.
FIRST: Final = 64
#: Size of the second sample, in multiples of the first.
HELD_OUT: Final = 2


class MatrixSample:
    """A uniform random sample of matrices of one layer, at most ``capacity``.

    Reservoir sampling by random keys: each matrix draws a key, and the
    matrices with the largest keys stay.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        # NumPy's stream does not depend on how a caller batches the draws.
        self._generator = np.random.default_rng(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        #: The matrices, and beta where it is offered.
        self._kept: list[torch.Tensor] = []

    def update(self, systems: Systems) -> torch.Tensor:
        """Offer flat systems, always with beta or always without; return the keys that were drawn."""
        drawn = torch.from_numpy(self._generator.random(systems.count))
        given = (systems.lower, systems.beta)
        self.offer(drawn, [x.to(torch.float32) for x in given if x is not None])
        return drawn

    def offer(self, drawn: torch.Tensor, given: Sequence[torch.Tensor]) -> None:
        """Offer matrices, and beta, with the keys that were drawn for them."""
        if not given:
            return
        if len(self._keys) == self.capacity:
            # Most matrices of a long stream draw too small a key to be copied at all.
            chances = drawn > self._keys[-1]
            drawn, given = drawn[chances], [x[chances.to(x.device)] for x in given]
        keys = torch.cat([self._keys, drawn])
        order = torch.topk(keys, min(self.capacity, len(keys))).indices
        old = self._kept or [x[:0] for x in given]
        # Copies, so that the rest of the batch can be freed.
        self._kept = [
            torch.cat([kept.to(new.device), new])[order.to(new.device)].clone()
            for kept, new in zip(old, given, strict=True)
        ]
        self._keys = keys[order]

    def skip(self, count: int) -> None:
        """Skip the draws of ``count`` matrices."""
        skip_draws(self._generator, count)

    def replace(self, keys: torch.Tensor, sample: Sequence[torch.Tensor]) -> None:
        """Take over the `drawn` of another sample of the same seed."""
        device = self._kept[0].device if self._kept else None
        self._keys, self._kept = keys, [x.to(device) for x in sample]

    @property
    def drawn(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The keys of the sample, largest first, and its matrices (and beta) in that order."""
        return self._keys, self._kept

    @property
    def systems(self) -> Systems:
        """The sample in float32, ``[n, C, C]`` with beta ``[n, C]`` where it was offered."""
        if not self._kept:
            raise RuntimeError("no matrix was offered yet")
        lower, *beta = self._kept
        return Systems(lower=lower, beta=beta[0] if beta else None)


def skip_draws(generator: np.random.Generator, count: int) -> None:
    """Advance a generator as far as ``count`` draws of ``random`` would."""
    stream = generator.bit_generator
    assert isinstance(stream, np.random.PCG64)  # what default_rng makes; one step per draw
    stream.advance(count)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerState:
    """What a `LayerObserver` remembers, as data."""

    #: Matrices counted, those of other processes included.
    matrices: int
    #: Matrices that programs ran on here.
    observed: int
    #: max|x| of each input.
    largest: Mapping[str, float]
    #: max|x| of each tensor, per program that is run.
    ranges: Sequence[Mapping[str, float]]
    #: Keys of the sample, largest first.
    keys: torch.Tensor
    #: Matrices of the sample, and beta, in that order.
    sample: Sequence[torch.Tensor]
    #: Keys of the second sample, largest first: 1 - key of the draw.
    held_keys: torch.Tensor
    #: Matrices of the second sample, beta and heads, in that order.
    held: Sequence[torch.Tensor]
    #: max|M| of each half of the matrices, by their draws.
    halves: tuple[float, float]


def merged(states: Sequence[LayerState], capacity: int) -> LayerState:
    """Return the state of one observer that saw all matrices, from observers that shared them.

    Only maxima, counts and the largest keys are merged, so the result is exact for every split.
    """
    sample, second = MatrixSample(capacity, seed=0), MatrixSample(HELD_OUT * capacity, seed=0)
    for state in states:
        sample.offer(state.keys, state.sample)
        second.offer(state.held_keys, state.held)
    keys, kept = sample.drawn
    held_keys, held = second.drawn
    return LayerState(
        matrices=max(state.matrices for state in states),
        observed=sum(state.observed for state in states),
        largest=_largest([state.largest for state in states]),
        ranges=[_largest(parts) for parts in zip(*(state.ranges for state in states), strict=True)],
        keys=keys,
        sample=kept,
        held_keys=held_keys,
        held=held,
        halves=_halves([state.halves for state in states]),
    )


def _halves(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    first, second = zip(*parts, strict=True)
    return max(first), max(second)


def _largest(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: max(part[name] for part in parts if name in part) for name in names}


class LayerObserver:
    """Everything that is remembered of one layer: ranges per candidate and a sample.

    The ranges of the inputs are those of all matrices.  The programs run on the first
    `FIRST` matrices and on a decreasing random share of the later ones (on matrix i with
    the probability ``FIRST / i``), which keeps the cost below that of the model.
    """

    def __init__(
        self, programs: Sequence[Program], capacity: int, seed: int, queue: RangeQueue | None = None
    ) -> None:
        self.programs = tuple(programs)
        #: Where matrices wait for programs, with those of other layers; by default they do not.
        self._queue = RangeQueue(1) if queue is None else queue
        whole = [p for p in programs if not any(_continues(q, p) for q in programs)]
        self._observers = [RangeObserver(program) for program in whole]
        self.sample = MatrixSample(capacity, seed)
        #: The matrices with the smallest draws, on which plans are measured, with their heads.
        self.held = MatrixSample(HELD_OUT * capacity, seed)
        #: max|M| of the matrices with small draws, and of those with large ones.
        self.halves = (0.0, 0.0)
        self.chunk = programs[0].chunk
        self.matrices = 0
        self.observed = 0
        self._largest: dict[str, float] = {}
        self._generator = np.random.default_rng((seed, 1))

    @property
    def sampled(self) -> Systems:
        """The sample; a single zero matrix where the data held no other."""
        if self.matrices:
            return self.sample.systems
        taken = self.programs[0].inverse_ports.beta is not None
        beta = torch.ones(1, self.chunk, dtype=torch.float32) if taken else None
        return Systems(lower=torch.zeros(1, self.chunk, self.chunk, dtype=torch.float32), beta=beta)

    def update(self, systems: Systems, heads: torch.Tensor | None = None) -> None:
        """Add checked systems, with beta where programs take it, and the head of each where it is known."""
        flat = systems.flat()
        drawn = self.sample.update(flat)
        known = torch.full((flat.count,), NO_HEAD, dtype=torch.int64) if heads is None else heads
        kept_parts = (flat.lower, flat.beta, known)
        self.held.offer(1.0 - drawn, [x.to(torch.float32) for x in kept_parts if x is not None])
        self._update_halves(flat.lower, drawn)
        kept = self._thinned(flat.count).to(flat.lower.device)
        self.matrices += flat.count
        inputs = program_inputs(self.programs[0], flat, torch.float32)
        for name, values in inputs.items():
            self._largest[name] = max(self._largest.get(name, 0.0), float(values.abs().max()))
        if (observed := int(kept.sum())) > 0:
            self.observed += observed
            self._queue.add(self._observers, {name: values[kept] for name, values in inputs.items()})

    def _update_halves(self, lower: torch.Tensor, drawn: torch.Tensor) -> None:
        largest, small = lower.abs().amax((1, 2)).to("cpu", torch.float64), drawn < 0.5
        each = (largest[small], largest[~small])
        first, second = (float(part.max()) if len(part) else 0.0 for part in each)
        self.halves = (max(self.halves[0], first), max(self.halves[1], second))

    def skip(self, count: int) -> None:
        """Count matrices that another process observes."""
        self.matrices += count
        self.sample.skip(count)
        skip_draws(self._generator, count)

    def state(self) -> LayerState:
        """Return what was seen so far."""
        self._queue.flush()
        keys, sample = self.sample.drawn
        held_keys, held = self.held.drawn
        return LayerState(
            matrices=self.matrices,
            observed=self.observed,
            largest=dict(self._largest),
            ranges=[dict(observer.ranges) for observer in self._observers],
            keys=keys,
            sample=[x.cpu() for x in sample],
            held_keys=held_keys,
            held=[x.cpu() for x in held],
            halves=self.halves,
        )

    def check(self, programs: Sequence[str], state: LayerState) -> None:
        """Refuse a state of an observer of other programs.

        Raises
        ------
        InputError
            If titles or tensors differ.
        """
        own = [observer.ranges.keys() for observer in self._observers]
        same = list(programs) == [program.title for program in self.programs]
        if not same or [ranges.keys() for ranges in state.ranges] != own:
            raise InputError(
                "the checkpoint was made for other programs; pass the same method, factored, target and "
                "hardware, or another checkpoint file"
            )

    def restore(self, state: LayerState) -> None:
        """Continue from a state of an observer with the same programs, capacity and seed."""
        self._queue.flush()
        self.skip(state.matrices - self.matrices)
        self.observed = state.observed
        self._largest = dict(state.largest)
        for observer, ranges in zip(self._observers, state.ranges, strict=True):
            observer.ranges = dict(ranges)
        self.sample.replace(state.keys, state.sample)
        self.held.replace(state.held_keys, state.held)
        self.halves = state.halves

    def ranges(self, program: Program) -> dict[str, float]:
        """Return ``max|x|`` of every tensor of one of the programs."""
        self._queue.flush()
        seen = next(o for o in self._observers if o.program is program or _continues(o.program, program))
        return {name: seen.ranges[name] for name in program.tensors} | self._largest

    def _thinned(self, count: int) -> torch.Tensor:
        index = self.matrices + 1 + np.arange(count)
        return torch.from_numpy(self._generator.random(count) * index < FIRST)


def _continues(longer: Program, shorter: Program) -> bool:
    """Whether ``longer`` starts with all steps of ``shorter``: one run then observes both."""
    count = len(shorter.steps)
    return len(longer.steps) > count and longer.steps[:count] == shorter.steps
