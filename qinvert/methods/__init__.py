"""The algorithms, one file each: functions ``(chunk, ...) -> Program``.

Each module of this package defines one `Method`, which says how its programs
are built and which of them the planner weighs; a new file is a new method.
Every function is also an attribute of the package, in place of the module of
the same name: ``from qinvert.methods import block_merge``.
"""

from __future__ import annotations

from collections.abc import Callable

from qinvert.discovery import definitions
from qinvert.errors import ProgramError, lookup
from qinvert.methods._method import AUTO, Candidates, Method
from qinvert.program.program import Program

#: Every method's function by its name.
METHODS: dict[str, Callable[..., Program]] = {}
#: Every method by its name, in the same order.
REGISTRY: dict[str, Method] = {}


def discover() -> dict[str, Method]:
    """Fill `METHODS` and `REGISTRY` from the modules of this package, and return the latter.

    It runs once on import; call it again after a folder was added to the
    package's ``__path__``.  If it fails, both tables stay as they were.

    Raises
    ------
    ProgramError
        If a module does not define ``METHOD``, or if two methods have the same name.
    """
    found = definitions(__name__, __path__, "METHOD", Method, ProgramError)
    methods = sorted(found.values(), key=lambda method: (method.sequential, method.rank, method.name))
    REGISTRY.clear()
    REGISTRY.update({method.name: method for method in methods})
    METHODS.clear()
    METHODS.update({method.name: method.build for method in methods})
    # Importing a module made it an attribute of the package; its function has the same name.
    globals().update(METHODS)
    return REGISTRY


def find_method(name: str) -> Callable[..., Program]:
    """Return the function of the method of that name.

    Raises
    ------
    ProgramError
        If there is no such method; the message lists the legal names.
    """
    return registered(name).build


def registered(name: str) -> Method:
    """Return the method of that name.

    Raises
    ------
    ProgramError
        If there is no such method; the message lists the legal names.
    """
    return lookup(REGISTRY, name, "method", ProgramError, f", {AUTO}, or a Program")


def in_automatic_order() -> list[Method]:
    """Return every method, in the order in which the planner meets their candidates."""
    return sorted(REGISTRY.values(), key=lambda method: (method.automatic_rank, method.name))


discover()

__all__ = [
    "AUTO",
    "METHODS",
    "REGISTRY",
    "Candidates",
    "Method",
    "discover",
    "find_method",
    "in_automatic_order",
    "registered",
    *METHODS,
]
