"""Runtimes that verification can use; a new one is one new module.

Each module of this package that defines a `Runtime` adds one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pkgutil import iter_modules

from qinvert.errors import ExportError, QInvertError, lookup, reason
from qinvert.export.runtimes.runtime import Execution, Feed, Runtime
from qinvert.export.runtimes.subprocesses import interpreter

__all__ = ["RUNTIMES", "Execution", "Feed", "Runtime", "discover", "execute", "installed"]


def discover() -> dict[str, Runtime]:
    """Return the runtime of every module that lies in this package now, by its name.

    A folder that is appended to the package's ``__path__`` adds the modules
    that it holds.
    """
    names = sorted(module.name for module in iter_modules(__path__) if not module.ispkg)
    modules = [import_module(f"{__name__}.{name}") for name in names]
    return {module.RUNTIME.name: module.RUNTIME for module in modules if hasattr(module, "RUNTIME")}


#: Every runtime by its name.
RUNTIMES: dict[str, Runtime] = discover()


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
