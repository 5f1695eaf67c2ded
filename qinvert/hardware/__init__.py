"""What programs cost on chips: tables of weights, one file a chip.

Each module of this package defines one `Hardware`; a new file is a new chip.
The planner compares candidates by these costs, and exports choose the number
of chains by them.  ``benchmarks/fit_hardware.py`` fits the weights.
"""

from __future__ import annotations

from qinvert.discovery import definitions
from qinvert.errors import PlanError, lookup
from qinvert.hardware._compiler import Compiler
from qinvert.hardware._hardware import MAX_BATCH, Hardware, Table, chain_counts

__all__ = [
    "HARDWARE",
    "MAX_BATCH",
    "Compiler",
    "Hardware",
    "Table",
    "chain_counts",
    "discover",
    "find_hardware",
]

#: Every chip by its name.
HARDWARE: dict[str, Hardware] = {}


def discover() -> dict[str, Hardware]:
    """Fill `HARDWARE` from the modules of this package, and return it.

    It runs once on import; call it again after a folder was added to the
    package's ``__path__``.  If it fails, the table stays as it was.

    Raises
    ------
    PlanError
        If a module does not define ``HARDWARE``, or if two chips have the same name.
    """
    found = definitions(__name__, __path__, "HARDWARE", Hardware, PlanError)
    HARDWARE.clear()
    HARDWARE.update(found)
    return HARDWARE


def find_hardware(name: str) -> Hardware:
    """Return the chip of that name.

    Raises
    ------
    PlanError
        If there is no such chip; the message lists the legal names.
    """
    return lookup(HARDWARE, name, "hardware", PlanError)


discover()
