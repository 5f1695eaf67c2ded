"""One pass over a source: an observer for every layer, whichever processes share the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, TypeAlias

import torch

from qinvert.calibration.heads import Granularity, split_heads
from qinvert.calibration.observers import LayerObserver, merged
from qinvert.calibration.sharding import Shard
from qinvert.calibration.sources import Item, check_size, open_groups
from qinvert.execute import needed_beta
from qinvert.program import Program

#: Called after every batch with the layer's name and the matrices seen so far.
Progress: TypeAlias = Callable[[str, int], None]
#: Programs to observe, by chunk size.
Programs: TypeAlias = Callable[[int], Sequence[Program]]

#: Matrices per layer that candidates are simulated on.
SAMPLE_SIZE: Final = 64


class Observation:
    """Observers of all layers, and the order in which they see matrices.

    Matrices are counted over all processes, batch by batch in the order of
    the data.  What is drawn for a matrix depends on its number alone, and
    every statistic is a maximum, a count, or the choice of the largest draws:
    any split of the data ends in the same statistics.
    """

    def __init__(self, programs: Programs, seed: int, shard: Shard) -> None:
        self.layers: dict[str, LayerObserver] = {}
        self._programs = programs
        self._seed = seed
        self._shard = shard

    def update(self, group: Sequence[Item]) -> list[str]:
        """Add what this process has of a round; return the names of all layers in it."""
        mine = [(layer, lower.shape[:-2].numel(), lower.shape[-1]) for layer, lower, _ in group]
        parts, items, seen = self._shard.gather("a batch", mine), iter(group), []
        for rank, part in enumerate(parts):
            for layer, count, chunk in part:
                observer = self._observer(layer, chunk)
                if rank == self._shard.rank:
                    _update(observer, *next(items))
                else:
                    observer.skip(count)
                seen.append(layer)
        return seen

    def finish(self) -> None:
        """Merge the statistics of all processes, in every process."""
        for layer, observer in self.layers.items():
            states = self._shard.gather(f"the end, layer {layer!r}", observer.state())
            if len(states) > 1:
                observer.restore(merged(states, SAMPLE_SIZE))

    def _observer(self, layer: str, chunk: int) -> LayerObserver:
        if layer not in self.layers:
            self.layers[layer] = LayerObserver(self._programs(chunk), SAMPLE_SIZE, self._seed)
        check_size(chunk, self.layers[layer].chunk, layer)
        return self.layers[layer]


def _update(observer: LayerObserver, layer: str, lower: torch.Tensor, given: torch.Tensor | None) -> None:
    observer.update(lower, needed_beta(observer.programs[0], lower, given, f"beta of layer {layer!r}"))


def observe(
    source: Any,
    data: Any,
    programs: Programs,
    *,
    granularity: Granularity,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, LayerObserver]:
    """Return an observer for every layer of ``source``, or for every head.

    Under torchrun each process observes its share of the batches, and all
    return the observers of the whole.

    Raises
    ------
    InputError
        If the source or one of its matrices is not legal, or lacks beta; or
        if another process fails.
    """
    shard = Shard.current()
    observation = Observation(programs, seed, shard)
    with shard.together():
        for group in open_groups(source, data, shard):
            for layer in observation.update(list(_split(group, granularity))):
                if progress is not None:
                    progress(layer, observation.layers[layer].matrices)
        observation.finish()
    return observation.layers


def _split(group: Iterable[Item], granularity: Granularity) -> Iterator[Item]:
    for item in group:
        if granularity is Granularity.HEAD:
            yield from split_heads(*item)
        else:
            yield item
