"""Puts another method into a module of a model, for the time of a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch


def replace_method(undo: ExitStack, module: torch.nn.Module, name: str, method: Callable[..., Any]) -> None:
    """Have a module call ``method`` in the place of its own one, until ``undo`` is left.

    A method that hangs on the module itself, and not on its class, is put back: it may be somebody else's.
    """
    undo.callback(_restore, module, name, vars(module).get(name))
    setattr(module, name, method)


def _restore(module: torch.nn.Module, name: str, before: Any) -> None:
    if before is None:
        delattr(module, name)
    else:
        setattr(module, name, before)
