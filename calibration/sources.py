"""Turns whatever a user has into a stream of ``(layer, L)`` pairs, with beta where it is known."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from qinvert.calibration.data.arrays import read_all, read_arrays
from qinvert.calibration.data.processes import Shard
from qinvert.errors import InputError
from qinvert.pretrained import opened
from qinvert.systems import Systems

#: Name of a layer, and systems of it.
Item: TypeAlias = tuple[str, Systems]

#: Passes on what it reads.
Passing: TypeAlias = Callable[[Iterable[Any]], Iterator[Any]]

#: One process that takes everything.
ALONE: Final = Shard()
#: Name of the only layer where a source does not name its layers.
DEFAULT_LAYER: Final = "layer"
#: In a file the array ``NAME.beta`` goes with the matrices ``NAME``.
BETA_SUFFIX: Final = ".beta"


def open_source(source: Any, data: Any = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream checked ``(layer, L)`` pairs, L of shape ``(..., C, C)``.

    Parameters
    ----------
    source
        One of: a Hugging Face model or its folder (then ``data`` holds text or tokens, see
        `qinvert.calibration.data.token_batches.token_batches`); ``{layer: L}``; a tensor
        or array L; a path to .npz or .safetensors with one array per layer; an
        object with ``get_next()`` that returns such a dict, or None at the
        end; an iterable of L, of such dicts or of pairs ``(layer, L)``.  Instead
        of L a pair ``(L, beta)`` is also legal, with beta of shape ``(..., C)``.
        In a file the array ``NAME.beta`` belongs to ``NAME``.
    data : optional
        Only for models.

    Raises
    ------
    InputError
        If the source is none of these, is empty, or holds a matrix that is
        not legal (while streaming).
    """
    return ((layer, systems.lower) for layer, systems in open_systems(source, data))


def open_systems(source: Any, data: Any = None) -> Iterator[Item]:
    """Stream checked ``(layer, systems)`` as `open_source` does, with beta where it is known."""
    return chain.from_iterable(open_groups(source, data))


def open_groups(
    source: Any, data: Any = None, shard: Shard = ALONE, passing: Passing = iter
) -> Iterator[list[Item]]:
    """Stream this process's share of `open_systems`: a list for every round of its shard.

    A list holds the layers of one forward pass, or one item of a source of
    matrices; it is empty where the last round has nothing for this process.
    ``passing`` sees every batch or item before it is shared out, and may drop some.
    """
    source = opened(source)
    if isinstance(source, torch.nn.Module):
        if data is None:
            raise InputError(
                "a model needs data=...: token ids [batch, length], a text file, or an iterable of batches"
            )
        return _captured(source, data, shard, passing)
    if data is not None:
        raise InputError("data=... goes with a model; pass matrices alone as the source")
    return _checked(_pairs(source), shard, passing)


def _captured(model: torch.nn.Module, data: Any, shard: Shard, passing: Passing) -> Iterator[list[Item]]:
    from qinvert.calibration.capture import Detail, capture_batch
    from qinvert.calibration.data.token_batches import token_batches

    def captured(batch: Any) -> list[Item]:
        found = capture_batch(model, batch, (Detail.BETA,))
        return [(item.layer, Systems(lower=item.lower, beta=item.beta)) for item in found]

    for batch in shard.slices(passing(token_batches(data, model))):
        # Nothing here keeps what was yielded while the next batch runs.
        yield [] if batch is None else captured(batch)


def _pairs(source: Any) -> Iterator[tuple[str, Any]]:
    match source:
        case str() | os.PathLike():
            yield from _with_beta(read_arrays(source))
        case torch.Tensor() | np.ndarray():
            yield DEFAULT_LAYER, source
        case tuple() if _is_pair(source):
            yield DEFAULT_LAYER, source
        case Mapping():
            yield from source.items()
        case _ if hasattr(source, "get_next"):
            for item in read_all(source):
                yield from _named(item)
        case Iterable():
            for item in source:
                yield from _named(item)
        case _:
            raise InputError(
                f"cannot read matrices from {type(source).__name__}; pass a model with data=..., "
                "{layer: L}, an iterable of L, a path to .npz or .safetensors, or a get_next() reader"
            )


def _with_beta(arrays: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    betas = {name + BETA_SUFFIX for name in arrays} & arrays.keys()
    for name, array in arrays.items():
        if name not in betas:
            beta = name + BETA_SUFFIX
            yield name, (array, arrays[beta]) if beta in betas else array


def _is_pair(item: Any) -> bool:
    if not isinstance(item, tuple) or len(item) != 2:
        return False
    # Two matrices have the same number of axes; a beta has one less than its L.
    lower, beta = (getattr(part, "ndim", None) for part in item)
    return lower is not None and beta == lower - 1


def _named(item: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(item, Mapping):
        return item.items()
    # What `qinvert.capture` streams.
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        return [item]
    return [(DEFAULT_LAYER, item)]


def _checked(pairs: Iterator[tuple[str, Any]], shard: Shard, passing: Passing) -> Iterator[list[Item]]:
    for pair in shard.slices(passing(_some(pairs))):
        yield [] if pair is None else [_check_item(*pair)]


def _some(pairs: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    empty = True
    for pair in pairs:
        empty = False
        yield pair
    if empty:
        raise InputError("the source holds no matrices; pass at least one L")


def _check_item(key: str, item: Any) -> Item:
    layer = str(key)
    matrices, beta = item if _is_pair(item) else (item, None)
    return layer, Systems.checked(matrices, beta, where=f" of layer {layer!r}")


def check_size(size: int, chunk: int, layer: str) -> None:
    """Refuse matrices of another size than the layer's.

    Raises
    ------
    InputError
        If the sizes differ; the message has both.
    """
    if size != chunk:
        raise InputError(
            f"layer {layer!r} has {size} x {size} matrices where {chunk} x {chunk} are expected; "
            "use one chunk size per layer, the same in calibration and simulation"
        )
