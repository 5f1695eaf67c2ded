"""One pass over a source: an observer for every layer, whether one process or several do the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from os import PathLike
from typing import Any, Final, TypeAlias

import torch

from qinvert.calibration.choices import Granularity
from qinvert.calibration.data.processes import Shard
from qinvert.calibration.head_names import head_number
from qinvert.calibration.heads import has_several_heads, head_indices, split_heads
from qinvert.calibration.model_digest import model_digest
from qinvert.calibration.observation.checkpoint import Checkpoint, Saved, SavedLayer
from qinvert.calibration.observation.data_record import DataRecord
from qinvert.calibration.observation.ranges import RangeQueue
from qinvert.calibration.observation.statistics import LayerObserver, LayerState, merged
from qinvert.calibration.sources import Item, Passing, check_size, open_groups
from qinvert.execution.inputs import needed
from qinvert.pretrained import opened
from qinvert.program.program import Program
from qinvert.systems import Systems

#: Called after every batch with the layer's name and the matrices seen so far.
Progress: TypeAlias = Callable[[str, int], None]
#: Programs to observe, by chunk size.
Programs: TypeAlias = Callable[[int], Sequence[Program]]

#: Matrices per layer that candidates are simulated on.
SAMPLE_SIZE: Final = 64


class Observation:
    """Observers of all layers, and the order in which they see matrices.

    Matrices are counted over all processes, batch by batch in the order of
    the data.  Those that are all zero, as padding gives them, are left out.
    What is drawn for a matrix depends on its number alone, and every statistic
    is a maximum, a count, or the choice of the largest draws.
    For that reason any split of the data leads to the same statistics.
    """

    def __init__(self, programs: Programs, seed: int, shard: Shard, checkpoint: Checkpoint | None) -> None:
        self.layers: dict[str, LayerObserver] = {}
        # Layers of one chunk size run the same programs, and so can run them together.
        self._programs = cache(programs)
        self._queue = RangeQueue()
        self._seed = seed
        self._shard = shard
        self._checkpoint = checkpoint

    def update(self, group: Sequence[Item]) -> list[str]:
        """Add this process's part of a round; return the names of all layers in the round."""
        # Before anything is counted: matrices keep their numbers, however the data are padded.
        filled = [(layer, *_filled(layer, systems)) for layer, systems in group]
        mine = [(layer, systems.count, systems.chunk) for layer, systems, _ in filled]
        due = self._checkpoint is not None and self._checkpoint.due
        gathered, items, seen = self._shard.gather("a batch", (due, mine)), iter(filled), []
        for rank, (_, part) in enumerate(gathered):
            for layer, count, chunk in part:
                observer = self._observer(layer, chunk)
                if rank == self._shard.rank:
                    _update(observer, *next(items))
                else:
                    observer.skip(count)
                seen.append(layer)
        # Clocks differ, so the first process decides.
        if gathered[0][0]:
            self._save(self._merged())
        return seen

    def resume(self, saved: Saved) -> None:
        """Continue from a checkpoint, whose statistics the first process takes over."""
        for layer, part in saved.layers.items():
            observer = self._observer(layer, part.chunk)
            observer.check(part.programs, part.state)
            if self._shard.rank == 0:
                observer.restore(part.state)
            else:
                observer.skip(part.state.matrices)

    def finish(self) -> None:
        """Merge the statistics of all processes, in every process."""
        states = self._merged()
        self._save(states)
        if self._shard.size > 1:
            for layer, observer in self.layers.items():
                observer.restore(states[layer])

    def _merged(self) -> dict[str, LayerState]:
        states: dict[str, LayerState] = {}
        for layer, observer in self.layers.items():
            parts = self._shard.gather(f"merging layer {layer!r}", observer.state())
            states[layer] = merged(parts, SAMPLE_SIZE)
        return states

    def _save(self, states: dict[str, LayerState]) -> None:
        if self._checkpoint is not None and self._shard.rank == 0:
            layers = {
                name: SavedLayer(
                    chunk=observer.chunk,
                    programs=[program.title for program in observer.programs],
                    state=states[name],
                )
                for name, observer in self.layers.items()
            }
            self._checkpoint.save(layers)

    def _observer(self, layer: str, chunk: int) -> LayerObserver:
        if layer not in self.layers:
            self.layers[layer] = LayerObserver(self._programs(chunk), SAMPLE_SIZE, self._seed, self._queue)
        check_size(chunk, self.layers[layer].chunk, layer)
        return self.layers[layer]


def _filled(layer: str, systems: Systems) -> tuple[Systems, torch.Tensor]:
    """Return flat systems without those that are all zero, and the head of each."""
    flat, number = systems.flat(), head_number(layer)
    # What is left of a head's own matrices has an axis of sequences where others have that of heads.
    heads = head_indices(systems) if number is None else torch.full((flat.count,), number, dtype=torch.int64)
    chosen = flat.is_filled
    return flat[chosen], heads[chosen.cpu()]


def _update(observer: LayerObserver, layer: str, systems: Systems, heads: torch.Tensor) -> None:
    systems = needed(observer.programs[0], systems, f"beta of layer {layer!r}")
    if systems.count:
        observer.update(systems, heads)


def observe(
    source: Any,
    data: Any,
    programs: Programs,
    *,
    granularity: Granularity,
    seed: int,
    progress: Progress | None = None,
    checkpoint: str | PathLike[str] | None = None,
    record: DataRecord | None = None,
) -> dict[str, LayerObserver]:
    """Return an observer for every layer of ``source``, for every head, or for both.

    Under torchrun each process observes its share of the batches, and all
    return observers of all batches.  With ``checkpoint``, statistics are
    saved in that file from time to time, and at the end.  If the file exists,
    the batches that it has seen are not observed again.  ``record`` counts the
    tokens of all batches.

    Raises
    ------
    InputError
        If the source or one of its matrices is not legal or lacks beta, if another process
        fails, or if the checkpoint was made from another model, other data or options.
    """
    shard = Shard.current()
    with shard.together():
        source = opened(source)
        options: dict[str, Any] = {"seed": seed, "granularity": str(granularity)}
        if checkpoint is not None and isinstance(source, torch.nn.Module):
            # The data alone say nothing of the model that made L of them.
            options["model"] = model_digest(source)
        file = None if checkpoint is None else Checkpoint(checkpoint, options, shard)
        observation = Observation(programs, seed, shard, file)
        if file is not None and file.saved is not None:
            observation.resume(file.saved)
        passing: Passing = iter if file is None else file.trail.follow
        if record is not None:
            passing = record.before(passing)
        for group in open_groups(source, data, shard, passing):
            for layer in observation.update(list(_split(group, granularity))):
                if progress is not None:
                    progress(layer, observation.layers[layer].matrices)
            # Free the batch before the model runs on the next one.
            group.clear()
        observation.finish()
    return observation.layers


def _split(group: Iterable[Item], granularity: Granularity) -> Iterator[Item]:
    for item in group:
        if granularity is not Granularity.HEAD:
            yield item
        # Where nothing is asked of heads, matrices need not have an axis of them.
        if granularity is Granularity.HEAD or (
            granularity is Granularity.AUTO and has_several_heads(item[1])
        ):
            yield from split_heads(*item)
