"""The algorithms, one file each: functions ``(chunk, ...) -> Program``."""

from __future__ import annotations

from collections.abc import Callable

from qinvert.errors import ProgramError, lookup
from qinvert.methods.block_merge import block_merge
from qinvert.methods.neumann import neumann
from qinvert.methods.neumann_doubling import neumann_doubling
from qinvert.program import Program

__all__ = ["METHODS", "block_merge", "find_method", "neumann", "neumann_doubling"]

#: Every method by its name.
METHODS: dict[str, Callable[..., Program]] = {f.__name__: f for f in (block_merge, neumann, neumann_doubling)}


def find_method(name: str) -> Callable[..., Program]:
    """Return the method of that name.

    Raises
    ------
    ProgramError
        If there is none; the message lists the legal names.
    """
    return lookup(METHODS, name, "method", ProgramError, ", auto, or a Program")
