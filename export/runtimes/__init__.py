"""Runtimes that verification can use; a new one is one new module.

Each module of this package that defines a `Runtime` adds one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from qinvert.discovery import definitions
from qinvert.errors import ExportError, QInvertError, lookup, reason
from qinvert.export.runtimes.runtime import Execution, Feed, Runtime
from qinvert.export.runtimes.subprocesses import interpreter

__all__ = ["RUNTIMES", "Execution", "Feed", "Runtime", "discover", "execute", "installed"]


#: Every runtime by its name.
RUNTIMES: dict[str, Runtime] = {}


def discover() -> dict[str, Runtime]:
    """Fill `RUNTIMES` from the modules of this package that define ``RUNTIME``, and return it.

    It runs once on import; call it again after a folder was added to the
    package's ``__path__``.  If it fails, the table stays as it was.

    Raises
    ------
    ExportError
        If a module's ``RUNTIME`` is something else, or if two runtimes have the same name.
    """
    found = definitions(__name__, __path__, "RUNTIME", Runtime, ExportError, required=False)
    RUNTIMES.clear()
    RUNTIMES.update(found)
    return RUNTIMES


discover()


def installed() -> list[str]:
    """Names of the runtimes that can run here."""
    return [name for name, runtime in RUNTIMES.items() if interpreter(name, runtime.module) is not None]


def execute(name: str, content: bytes, feeds: Sequence[Feed]) -> Iterator[Execution]:
    """Yield what each setting of the named runtime makes of a serialized model.

    Raises
    ------
    ExportError
        If there is no such runtime (the message lists the legal names), it
        is not installed, or it refuses the graph while loading or running it.
    """
    executions = lookup(RUNTIMES, name, "runtime", ExportError).execute(content, feeds)
    while True:
        with _refusals(name):
            found = next(executions, None)
        if found is None:
            return
        yield found


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    # Runtimes raise types of their own, derived from Exception.
    try:
        yield
    except QInvertError:
        raise
    except Exception as error:
        raise ExportError(f"{name} refuses the graph: {reason(error)}; export it again") from error
