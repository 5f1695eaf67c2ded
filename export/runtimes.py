"""Runtimes that verification can use, each found by import."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy.typing as npt

from qinvert.errors import ExportError, QInvertError, lookup, reason

#: ``run({"L": array}) -> T`` of a loaded graph.
Run: TypeAlias = Callable[[Mapping[str, npt.NDArray[Any]]], npt.NDArray[Any]]
#: Yields (setting, run) for each way to run a serialized model.
Loader: TypeAlias = Callable[[bytes], Iterator[tuple[str, Run]]]


def onnxruntime_settings(content: bytes) -> Iterator[tuple[str, Run]]:
    """Yield onnxruntime on the CPU, unoptimized and optimized.

    ``session.qdqisint8allowed`` keeps int8 as int8: by default an x64 session
    turns int8 QDQ into uint8 for single nodes and leaves chains unfused, in
    float MatMuls.
    """
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    for setting, level in (("unoptimized", levels.ORT_DISABLE_ALL), ("optimized", levels.ORT_ENABLE_ALL)):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        yield setting, lambda feed, session=session: session.run(None, dict(feed))[0]  # type: ignore[misc]


#: Every runtime by its name.
RUNTIMES: dict[str, Loader] = {"onnxruntime": onnxruntime_settings}


def run_settings(name: str, content: bytes) -> Iterator[tuple[str, Run]]:
    """Yield (setting, run) of the named runtime for a serialized model.

    Raises
    ------
    ExportError
        If there is no such runtime (the message lists the legal names), or
        it refuses the graph while loading or running it.
    """
    settings = lookup(RUNTIMES, name, "runtime", ExportError)(content)
    while True:
        with _refusals(name):
            found = next(settings, None)
        if found is None:
            return
        setting, run = found
        yield setting, _guarded(name, run)


def _guarded(name: str, run: Run) -> Run:
    def guarded(feed: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        with _refusals(name):
            return run(feed)

    return guarded


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    # Runtimes raise types of their own, derived from Exception.
    try:
        yield
    except QInvertError:
        raise
    except Exception as error:
        raise ExportError(f"{name} refuses the graph: {reason(error)}; export it again") from error
