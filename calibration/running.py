"""Which patched layer runs in this thread, and the function that asks it for its delta rule."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from qinvert.delta_rule.chunks import Applied, ChunkOutputs, DeltaChunks

#: ``inverse(layer, chunks) -> T``, or what the whole step returns.
LayerInverse: TypeAlias = Callable[[str, DeltaChunks], Applied | ChunkOutputs]
#: What a layer calls, with the signature of `qinvert.chunk_gated_delta_rule`.
DeltaRule: TypeAlias = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class _Running(threading.local):
    """Patched layers whose forward pass is under way in this thread, innermost last."""

    def __init__(self) -> None:
        self.layers: list[DeltaRule] = []
        #: What a rule raised last: it reaches the caller as it is, and not as an error of the model.
        self.failure: Exception | None = None


running = _Running()


def track(layer: torch.nn.Module, rule: DeltaRule, undo: ExitStack) -> None:
    """Have the layer say when it runs, and what it is to call, until ``undo``."""
    undo.callback(layer.register_forward_pre_hook(_Enter(rule)).remove)
    # always_call: the entry must also be removed after an exception in forward.
    undo.callback(layer.register_forward_hook(_Leave(), always_call=True).remove)


class _Hook:
    """A hook of a patched layer; a copy or pickle of the layer is not patched, and its hook does nothing."""

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _idle_hook, ()


class _Enter(_Hook):
    """The layer's forward pass begins."""

    def __init__(self, rule: DeltaRule) -> None:
        self._rule = rule

    def __call__(self, *_: Any) -> None:
        running.layers.append(self._rule)


class _Leave(_Hook):
    """It has ended, perhaps by an exception."""

    def __call__(self, *_: Any) -> None:
        running.layers.pop()


def _idle_hook() -> Callable[..., None]:
    return _idle


def _idle(*_: Any) -> None:
    """Do nothing."""


@dataclass(slots=True)
class _Redirection:
    """A function that patched models share: which layer runs decides what a call does."""

    owner: Any
    name: str
    original: Callable[..., Any]
    #: Patches in force; the last one to leave restores the original.
    users: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A module global is shared: other models of the family keep the original.
        if not running.layers:
            return self.original(*args, **kwargs)
        try:
            return running.layers[-1](*args, **kwargs)
        except Exception as error:
            running.failure = error
            raise

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        # A layer that holds this is copied or pickled without the patch.
        return _itself, (self.original,)

    def release(self) -> None:
        """Count one patch less."""
        with _redirecting:
            self.users -= 1
            if self.users == 0 and getattr(self.owner, self.name) is self:
                setattr(self.owner, self.name, self.original)


def _itself(original: Any) -> Any:
    return original


_redirecting = threading.Lock()


def redirect(owner: Any, name: str, undo: ExitStack) -> None:
    """Have calls of a function of ``owner`` run the rule of the layer that runs, until ``undo``."""
    with _redirecting:
        current = getattr(owner, name)
        redirection = current if isinstance(current, _Redirection) else _Redirection(owner, name, current)
        redirection.users += 1
        setattr(owner, name, redirection)
    undo.callback(redirection.release)
