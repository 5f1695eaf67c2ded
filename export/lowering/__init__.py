"""From a plan to the nodes of a graph: one module for each kind of lowering.

Profiles name their lowering by the name of its module, which defines
``LOWERING``, a subclass of `qinvert.export.lowering.base.GraphLowering`; a new
file is a new lowering.  Modules without a ``LOWERING`` hold what all share.
"""

from __future__ import annotations

from qinvert.discovery import modules
from qinvert.errors import ExportError, lookup
from qinvert.export.lowering.base import GraphLowering


def discover() -> dict[str, type[GraphLowering]]:
    """Return every lowering of this package by the name of its module.

    Raises
    ------
    ExportError
        If a module calls something else its lowering.
    """
    found: dict[str, type[GraphLowering]] = {}
    for name, module in modules(__name__, __path__):
        lowering = getattr(module, "LOWERING", None)
        if isinstance(lowering, type) and issubclass(lowering, GraphLowering):
            found[name] = lowering
        elif lowering is not None:
            raise ExportError(
                f"module {module.__name__} has the LOWERING {lowering!r}; make it a subclass of GraphLowering"
            )
    return found


def find_lowering(name: str) -> type[GraphLowering]:
    """Return the lowering that a profile names.

    Raises
    ------
    ExportError
        If there is no such lowering; the message lists the legal names.
    """
    more = f", or add a module to {__name__} that defines LOWERING"
    return lookup(discover(), name, "lowering", ExportError, more)
