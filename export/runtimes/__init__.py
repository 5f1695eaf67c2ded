"""Runtimes that verification can use; a new one is one new module.

Each module of this package that defines a `Runtime` adds one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path

from qinvert.discovery import definitions
from qinvert.errors import ExportError, QInvertError, lookup, reason
from qinvert.export.runtimes.estimates import CycleEstimate, Request
from qinvert.export.runtimes.runtime import Execution, Feed, Runtime
from qinvert.export.runtimes.subprocesses import interpreter
from qinvert.files import make_folder

__all__ = [
    "RUNTIMES",
    "CycleEstimate",
    "Execution",
    "Feed",
    "Runtime",
    "discover",
    "estimate",
    "estimates",
    "estimators",
    "execute",
    "execute_sequences",
    "installed",
]


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


def execute(
    name: str, content: bytes, feeds: Sequence[Feed], *, keep: str | PathLike[str] | None = None
) -> Iterator[Execution]:
    """Yield what each setting of the named runtime makes of a serialized model.

    With ``keep``, the files that its compiler made are copied into that folder.

    Raises
    ------
    ExportError
        If there is no such runtime (the message lists the legal names), it
        is not installed, it keeps nothing but is asked to, or it refuses the
        graph while loading or running it.
    """
    runtime = lookup(RUNTIMES, name, "runtime", ExportError)
    if keep is None:
        return _refused(name, runtime.execute(content, feeds))
    return _answers(runtime, content, feeds, _request(runtime, (), keep))


def execute_sequences(
    name: str, content: bytes, sequences: Sequence[Sequence[Feed]], carried: Mapping[str, str]
) -> Iterator[Execution]:
    """Yield what each setting of the named runtime makes of sequences of calls that hand a state on.

    Parameters
    ----------
    name : str
    content : bytes
    sequences : sequence of sequences of feeds
        Inputs of every call; what is handed on needs to be in the first of a sequence only.
    carried : mapping
        Input of the next call that each output becomes.

    Raises
    ------
    ExportError
        As `execute`, or if the runtime cannot hand a state on.
    """
    runtime = lookup(RUNTIMES, name, "runtime", ExportError)
    if runtime.carry is None:
        able = ", ".join(other.name for other in RUNTIMES.values() if other.carry is not None)
        raise ExportError(f"{name} cannot hand the state of a chunk step from call to call yet; use {able}")
    return _refused(name, runtime.carry(content, sequences, carried))


def estimators() -> dict[str, Runtime]:
    """Return the runtime that estimates cycles, by the name of each chip.

    Raises
    ------
    ExportError
        If two runtimes estimate for a chip of the same name.
    """
    found: dict[str, Runtime] = {}
    for runtime in RUNTIMES.values():
        for chip in runtime.hardware:
            other = found.setdefault(chip, runtime)
            if other is not runtime:
                raise ExportError(
                    f"the runtimes {other.name} and {runtime.name} both estimate {chip}; rename one"
                )
    return found


def estimate(
    content: bytes, hardware: str, *, keep: str | PathLike[str] | None = None, partial_costs: bool = False
) -> CycleEstimate:
    """Return the cycles of one call of a serialized model, as the chip's compiler predicts them.

    Parameters
    ----------
    content : bytes
    hardware : str
        A key of `estimators`, such as ``"hexagon-v81"``.
    keep : path, optional
        Folder that gets the compiled files; it is made if it does not exist.
    partial_costs : bool
        Whether cycles may leave operators out; ``uncosted`` then counts these.

    Raises
    ------
    ExportError
        If no runtime knows the chip (the message lists the legal names), its
        toolkit is not installed or refuses the graph, or it has no cost for
        some operators: their cycles would be missing.
    """
    runtime = lookup(estimators(), hardware, "hardware", ExportError)
    answers = _answers(runtime, content, (), _request(runtime, (hardware,), keep))
    return _only_estimate(runtime, hardware, answers, partial_costs=partial_costs)


def estimates(contents: Sequence[bytes], hardware: str) -> Iterator[CycleEstimate | ExportError]:
    """Yield what `estimate` returns or raises for each of several models, in their order.

    One process compiles all of them where the runtime can do so: its start takes
    longer than a small graph.

    Raises
    ------
    ExportError
        If no runtime knows the chip, or its toolkit is not installed.
    """
    runtime = lookup(estimators(), hardware, "hardware", ExportError)
    if runtime.compile_each is None:
        yield from (_tried(partial(estimate, content, hardware)) for content in contents)
        return
    for found in runtime.compile_each(contents, Request(hardware=(hardware,))):
        if isinstance(found, ExportError):
            yield found
        else:
            yield _tried(partial(_only_estimate, runtime, hardware, found))


def _tried(estimating: Callable[[], CycleEstimate]) -> CycleEstimate | ExportError:
    try:
        return estimating()
    except ExportError as error:
        return error


def _only_estimate(
    runtime: Runtime, hardware: str, answers: Iterable[Execution], *, partial_costs: bool = False
) -> CycleEstimate:
    found = [answer.estimate for answer in answers if answer.estimate is not None]
    if len(found) != 1 or found[0].hardware != hardware:
        raise ExportError(f"{runtime.name} gave no estimate for {hardware}; report this with the graph")
    if found[0].uncosted and not partial_costs:
        raise ExportError(
            f"{found[0].source}: {found[0].uncosted} operators of this graph have no cost there, so that its "
            f"{found[0].cycles} cycles are too few; choose another method or profile"
        )
    return found[0]


def _request(runtime: Runtime, hardware: Sequence[str], keep: str | PathLike[str] | None) -> Request:
    if keep is None:
        return Request(hardware=hardware)
    if not runtime.loading:
        able = ", ".join(name for name, other in RUNTIMES.items() if other.loading)
        raise ExportError(f"{runtime.name} makes no file to keep; these do: {able}")
    make_folder(keep)
    return Request(hardware=hardware, keep=Path(keep))


def _answers(
    runtime: Runtime, content: bytes, feeds: Sequence[Feed], request: Request
) -> Iterator[Execution]:
    assert runtime.compile is not None, "a runtime with hardware or loading has compile"
    return _refused(runtime.name, runtime.compile(content, feeds, request))


def _refused(name: str, executions: Iterator[Execution]) -> Iterator[Execution]:
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
