"""The algorithms, one file each: functions ``(chunk, ...) -> Program``."""

from __future__ import annotations

from collections.abc import Callable

from qinvert.errors import ProgramError, lookup
from qinvert.methods.banded_residual import banded_residual
from qinvert.methods.block_merge import block_merge
from qinvert.methods.column_sweep import column_sweep
from qinvert.methods.forward_substitution import forward_substitution
from qinvert.methods.neumann import neumann
from qinvert.methods.neumann_doubling import neumann_doubling
from qinvert.methods.newton_schulz import newton_schulz
from qinvert.program.program import Program

_ALL: tuple[Callable[..., Program], ...] = (
    block_merge,
    banded_residual,
    neumann,
    neumann_doubling,
    newton_schulz,
    forward_substitution,
    column_sweep,
)

#: Every method by its name.
METHODS: dict[str, Callable[..., Program]] = {f.__name__: f for f in _ALL}

__all__ = [
    "METHODS",
    "banded_residual",
    "block_merge",
    "column_sweep",
    "find_method",
    "forward_substitution",
    "neumann",
    "neumann_doubling",
    "newton_schulz",
]


def find_method(name: str) -> Callable[..., Program]:
    """Return the method of that name.

    Raises
    ------
    ProgramError
        If there is none; the message lists the legal names.
    """
    return lookup(METHODS, name, "method", ProgramError, ", auto, or a Program")
