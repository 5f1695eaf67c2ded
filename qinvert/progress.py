"""How far long work has come: the library reports steps, and whoever listens shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

#: Called as ``listener(what, done, total)``: what is counted, how many are done, and of how many.
Listener = Callable[[str, int, int], None]

_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Report to ``listener`` inside the block; an outer listener hears nothing of it."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def report(what: str, done: int, total: int) -> None:
    """Tell the listener, if there is one, that ``done`` of ``total`` are done."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(what, done, total)


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yield the items, and report each one when the next is asked for."""
    report(what, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        report(what, done, total)
