"""Several processes, as torchrun starts them, that share one pass over the data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar, cast

import torch

from qinvert.errors import InputError, reason

T = TypeVar("T")


class _OtherProcessError(InputError):
    """Another process failed; this one cannot go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Message:
    """What processes send to each other; all of them must be at the same step of the same job."""

    step: str
    content: Any = None
    #: Why the sender gives up.
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Place of a process among those that share the data.

    Every process reads all data in rounds.  A round has as many items as
    there are processes, and each process takes one of them.
    """

    rank: int = 0
    #: Number of processes.
    size: int = 1
    #: A process group that moves CPU tensors; None for torch's default one.
    group: Any = None

    @classmethod
    def current(cls) -> Shard:
        """Return the place of this process in torch's process group; without a group it is alone."""
        dist = torch.distributed
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        # Statistics are CPU tensors, whatever backend moves the model's tensors.
        group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), group=group)

    def slices(self, items: Iterable[T]) -> Iterator[T | None]:
        """Yield this process's item of every round; None where the last round has no item for it."""
        iterator = iter(items)
        while taken := list(islice(iterator, self.size)):
            yield taken[self.rank] if self.rank < len(taken) else None

    def gather(self, step: str, content: T) -> list[T]:
        """Return what every process passes here, by rank.

        Raises
        ------
        InputError
            If another process has failed, or is at another step.
        """
        if self.size == 1:
            return [content]
        messages = self._exchange(_Message(step=step, content=content))
        for rank, message in enumerate(messages):
            if message.failure is not None:
                raise _OtherProcessError(f"process {rank} of {self.size} failed: {message.failure}")
            if message.step != step:
                raise _OtherProcessError(
                    f"process {rank} is at {message.step}, but process {self.rank} is at {step}; "
                    "pass the same data and options to every process"
                )
        return [message.content for message in messages]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let a failure inside the block also end the other processes, instead of leaving them waiting."""
        try:
            yield
        except _OtherProcessError:
            raise
        except Exception as error:
            if self.size > 1:
                self._exchange(_Message(step="failure", failure=reason(error)))
            raise

    def _exchange(self, message: _Message) -> list[_Message]:
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, message, group=self.group)
        return cast("list[_Message]", found)


@contextmanager
def joined() -> Iterator[Shard]:
    """Join the other processes where torchrun started this one; leave them at the end."""
    dist = torch.distributed
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ
    if not started or dist.is_initialized():
        yield Shard.current()
        return
    dist.init_process_group("gloo")
    try:
        yield Shard.current()
    finally:
        dist.destroy_process_group()
