"""One pass of a model over data: what every layer's chunk step holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from qinvert.calibration.chunk_steps.observation import ChunkObserver, Observed, merged
from qinvert.calibration.chunk_steps.results import head_of
from qinvert.calibration.data.processes import Shard
from qinvert.calibration.data.token_batches import attended, token_batches
from qinvert.calibration.observation.data_record import DataRecord
from qinvert.calibration.patching import forward, patched_by_layer, solve_chunks
from qinvert.delta_rule.chunks import DeltaChunks
from qinvert.errors import InputError
from qinvert.matrices import SolvedInverse
from qinvert.program.program import Program

#: Called after every batch with the layer's name and the tokens seen so far.
Progress: TypeAlias = Callable[[str, int], None]
#: The program of a layer, by its chunks.
Programs: TypeAlias = Callable[[DeltaChunks], Program]


def observe_steps(
    model: torch.nn.Module,
    data: Any,
    programs: Programs,
    *,
    rotated: bool,
    progress: Progress | None,
    record: DataRecord,
) -> dict[str, tuple[Program, Observed]]:
    """Return the program of every layer and what it held, over this pass; ``record`` counts the tokens.

    Under torchrun every process takes its share of the batches, and all return the statistics of
    all batches.

    Raises
    ------
    InputError
        If the model or a batch is not legal, the data hold no token, or another process fails.
    """
    shard, observers = Shard.current(), dict[str, ChunkObserver]()

    def see(layer: str, chunks: DeltaChunks) -> SolvedInverse:
        _check_finite(layer, chunks)
        if layer not in observers:
            observers[layer] = ChunkObserver(programs(chunks), rotated=rotated)
        observers[layer].update(chunks, sampled=shard.rank == 0)
        if progress is not None:
            progress(layer, observers[layer].tokens)
        return solve_chunks(layer, chunks)

    with shard.together():
        # Batches of padding alone are dropped before the rest is shared out: the sample comes from the first.
        real = (batch for batch in token_batches(data, model) if bool(attended(batch).any()))
        for batch in shard.slices(record.follow(real)):
            if batch is not None:
                with patched_by_layer(model, see):
                    forward(model, batch)
        for observer in observers.values():
            record.check(observer.program.chunk)
        own = {name: (observer.program, observer.observed()) for name, observer in observers.items()}
        return _merged(shard.gather("merging layers", own))


def _check_finite(layer: str, chunks: DeltaChunks) -> None:
    given = {"q": chunks.q, "k": chunks.k, "v": chunks.v, "g": chunks.g, "beta": chunks.beta}
    for name, values in given.items():
        if not bool(torch.isfinite(values).all()):
            raise InputError(
                f"{name} of layer {layer!r} holds NaN or Inf values; look for them upstream, or "
                "run the model in float32"
            )


def _merged(parts: list[dict[str, tuple[Program, Observed]]]) -> dict[str, tuple[Program, Observed]]:
    layers: dict[str, Program] = {name: program for part in parts for name, (program, _) in part.items()}
    if not layers:
        raise InputError("the data hold no token; pass at least one sequence")
    return {
        name: (program, merged([part[name][1] for part in parts if name in part]))
        for name, program in layers.items()
    }


def split_heads(observed: Observed) -> list[Observed]:
    """Return the statistics of every head by itself."""
    sample = observed.sample
    assert sample is not None
    return [
        replace(observed, largest=_head(observed.largest, head), sample=head_of(sample, head))
        for head in range(observed.heads)
    ]


def _head(largest: Mapping[str, torch.Tensor], head: int) -> dict[str, torch.Tensor]:
    return {name: x[head : head + 1] for name, x in largest.items()}
