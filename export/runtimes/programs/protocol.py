"""What every program of this folder shares; needs NumPy alone.

A program gets a folder with ``model.onnx`` and ``feeds.npz``, each input
stacked over calls.  It leaves ``report.json`` with one entry per setting, and
``outputs_<i>.npz`` beside it.  A traceback and a nonzero exit code mean that
the toolkit refused the graph.

A program that answers requests also finds ``request.json`` where there is
one: ``{"estimate": [names of chips], "keep": true or false}``.  It then adds an
entry for each chip, with the fields of ``CycleEstimate`` under ``"estimate"``,
and names files of the folder that are to be kept under ``"kept"``.  Without
``feeds.npz`` it compiles for those chips only.

Where ``carry.json`` lies beside the feeds, ``{"carried": {output: input}, "calls": number}``, so
many calls follow one another, and each takes from the one before what it says: `run_calls`.  A
program that does so yields every output of a call by its name.

Several folders may be named: starting a toolkit takes longer than compiling a
small graph.  A graph that is refused then leaves ``refused.txt`` in its folder,
and the next one follows.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
#: Outputs of every call: the first one, or all by their names.
Outputs = Sequence[Array] | Sequence[dict[str, Array]]
#: ``setting, outputs by call, types of products by node, nodes left to another processor``.
Outcome = tuple[str, Outputs, dict[str, str], list[str]]
#: What answers a request: the same, without outputs where there were no feeds, and then
#: ``{"estimate": ..., "kept": [...]}``.
Answer = tuple[str, Outputs, dict[str, str], list[str], dict[str, Any]]
#: ``program(model file, feeds, scratch folder)``.
Program = Callable[[Path, list[dict[str, Array]], Path], Iterator[Outcome | Answer]]


def main(program: Program) -> None:
    """Run ``program`` on the folder that the command line names, or on each of several."""
    folders = [Path(name) for name in sys.argv[1:]]
    if len(folders) == 1:
        answer(program, folders[0])
        return
    for folder in folders:
        try:
            answer(program, folder)
        except (Exception, SystemExit) as error:
            lines = [str(error)] if isinstance(error, SystemExit) else traceback.format_exception_only(error)
            (folder / "refused.txt").write_text("".join(lines), encoding="utf-8")


def answer(program: Program, folder: Path) -> None:
    """Run ``program`` on one folder and write its report."""
    report = []
    outcomes = program(folder / "model.onnx", read_feeds(folder / "feeds.npz"), folder)
    for i, (setting, outputs, products, elsewhere, *answers) in enumerate(outcomes):
        names = write_outputs(folder / f"outputs_{i}.npz", outputs)
        entry = {"setting": setting, "products": products, "elsewhere": elsewhere, "outputs": names}
        report.append({**entry, **(answers[0] if answers else {})})
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def write_outputs(file: Path, outputs: Outputs) -> list[str]:
    """Write the outputs of every call, each stacked; return their names, if they have some."""
    if not outputs:
        return []
    if not isinstance(outputs[0], dict):
        np.savez(file, outputs=np.stack(cast("Sequence[Array]", outputs)))
        return []
    calls = cast("Sequence[dict[str, Array]]", outputs)
    # Names of tensors are no names of files.
    stacked = {f"output_{i}": np.stack([call[name] for call in calls]) for i, name in enumerate(calls[0])}
    np.savez(file, allow_pickle=False, **stacked)
    return list(calls[0])


def run_calls(
    call: Callable[[dict[str, Array]], dict[str, Array]], feeds: list[dict[str, Array]], folder: Path
) -> list[dict[str, Array]]:
    """Return every output of every call; calls of a sequence take from the one before what they are told."""
    file = folder / "carry.json"
    asked: dict[str, Any] = {"carried": {}, "calls": 1}
    if file.is_file():
        asked = json.loads(file.read_text(encoding="utf-8"))
    results: list[dict[str, Array]] = []
    for i, feed in enumerate(feeds):
        first = i % asked["calls"] == 0
        state = {} if first else {name: results[-1][output] for output, name in asked["carried"].items()}
        results.append(call({**feed, **state}))
    return results


def log(folder: Path) -> str:
    """Return what this process and the toolkit's own libraries have printed so far."""
    sys.stdout.flush()
    file = folder / "log.txt"
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def request(folder: Path) -> tuple[list[str], bool]:
    """Chips to estimate cycles for, and whether compiled files are kept."""
    file = folder / "request.json"
    if not file.is_file():
        return [], False
    asked = json.loads(file.read_text(encoding="utf-8"))
    return list(asked["estimate"]), bool(asked["keep"])


def read_feeds(path: Path) -> list[dict[str, Array]]:
    """Return the inputs of every call; none where a graph is to be compiled only."""
    if not path.is_file():
        return []
    with np.load(path, allow_pickle=False) as archive:
        stacked = {name: archive[name] for name in archive.files}
    calls = len(next(iter(stacked.values())))
    return [{name: array[i] for name, array in stacked.items()} for i in range(calls)]
