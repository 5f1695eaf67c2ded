"""Runtimes that run in a process of their own, under a time limit.

Vendor toolkits pin versions that do not fit other packages, crash, or never
end on graphs that they do not support.  Each has a program in the folder
``programs`` that needs only NumPy and the toolkit, so that it can run in
another environment.  The variable ``QINVERT_<NAME>_PYTHON`` names that
environment's interpreter.  Without the variable the toolkit must be installed beside
this package.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from qinvert.errors import ExportError
from qinvert.export.runtimes.estimates import CycleEstimate, Request
from qinvert.export.runtimes.runtime import Execution, Feed, Runtime
from qinvert.numerics.law import Rounding
from qinvert.temporaries import scratch_folder

PROGRAMS: Final = Path(__file__).parent / "programs"
#: Lines of a program's complaint that an error repeats.
COMPLAINT_LINES: Final = 3


def separate(
    name: str,
    summary: str,
    module: str,
    requirement: str,
    *,
    own_steps: int = 0,
    inputs: str = "float32",
    reorders: bool = False,
    rounding: Rounding = Rounding.ONNX,
    hardware: Mapping[str, str] | None = None,
    loading: str = "",
    carries: bool = False,
    seconds: float = 600,
) -> Runtime:
    """Return the runtime whose program is ``programs/<name>_program.py``.

    Parameters
    ----------
    name, summary, module, requirement, own_steps, inputs, reorders, rounding, hardware, loading
        See `Runtime`.  With chips or a way to load files the program must answer requests.
    carries : bool
        Whether the program runs sequences of calls, by `protocol.run_calls`.
    seconds : float
        Time limit for one graph.
    """
    compiles = partial(_compile, name, module, requirement, loading, seconds)
    return Runtime(
        name=name,
        execute=partial(compiles, request=Request()),
        summary=summary,
        module=module,
        requirement=requirement,
        own_steps=own_steps,
        inputs=inputs,
        reorders=reorders,
        rounding=rounding,
        compile=compiles if hardware or loading else None,
        compile_each=partial(_compile_each, name, module, requirement, seconds) if hardware else None,
        carry=partial(_carry, name, module, requirement, seconds) if carries else None,
        hardware=hardware or {},
        loading=loading,
    )


def interpreter(name: str, module: str) -> str | None:
    """Interpreter that has the runtime, or None."""
    named = os.environ.get(f"QINVERT_{name.upper()}_PYTHON")
    if named:
        return named
    return sys.executable if find_spec(module) is not None else None


def how_to_install(name: str, requirement: str) -> str:
    """Say that a runtime is not installed, and what to do about it."""
    return (
        f"{name} is not installed; run: pip install {requirement}, or set "
        f"QINVERT_{name.upper()}_PYTHON to the interpreter of an environment that has it"
    )


def _compile(
    name: str,
    module: str,
    requirement: str,
    loading: str,
    seconds: float,
    content: bytes,
    feeds: Sequence[Feed],
    request: Request,
) -> Iterator[Execution]:
    command = _command(name, module, requirement)
    with scratch_folder() as folder:
        _write_job(folder, content, feeds, request)
        complaint = _run([*command, str(folder)], folder, name, seconds)
        if complaint:
            raise ExportError(complaint)
        yield from _read_executions(folder, request, loading)


def _carry(
    name: str,
    module: str,
    requirement: str,
    seconds: float,
    content: bytes,
    sequences: Sequence[Sequence[Feed]],
    carried: Mapping[str, str],
) -> Iterator[Execution]:
    command = _command(name, module, requirement)
    calls = len(sequences[0])
    with scratch_folder() as folder:
        # What is handed on is overwritten: it only makes all calls alike.
        feeds = [{**sequence[0], **feed} for sequence in sequences for feed in sequence]
        _write_job(folder, content, feeds, Request())
        asked = {"carried": dict(carried), "calls": calls}
        (folder / "carry.json").write_text(json.dumps(asked), encoding="utf-8")
        complaint = _run([*command, str(folder)], folder, name, seconds)
        if complaint:
            raise ExportError(complaint)
        for i, execution in enumerate(_read_executions(folder, Request(), "")):
            results = _named_outputs(folder, i)
            found = [results[start : start + calls] for start in range(0, len(results), calls)]
            yield replace(execution, sequences=found)


def _named_outputs(folder: Path, index: int) -> list[Feed]:
    """Every output of every call by its name."""
    import numpy as np

    names = json.loads((folder / "report.json").read_text(encoding="utf-8"))[index]["outputs"]
    with np.load(folder / f"outputs_{index}.npz", allow_pickle=False) as archive:
        stacked = {name: archive[f"output_{i}"] for i, name in enumerate(names)}
    calls = len(next(iter(stacked.values())))
    return [{name: array[i] for name, array in stacked.items()} for i in range(calls)]


def _compile_each(
    name: str, module: str, requirement: str, seconds: float, contents: Sequence[bytes], request: Request
) -> Iterator[Sequence[Execution] | ExportError]:
    command = _command(name, module, requirement)
    with scratch_folder() as parent:
        folders = [parent / str(i) for i in range(len(contents))]
        for folder, content in zip(folders, contents, strict=True):
            folder.mkdir()
            _write_job(folder, content, (), request)
        while folders:
            words = [*command, *map(str, folders)]
            complaint = _run(words, folders[-1], name, seconds * len(folders))
            done = list(takewhile(_answered, folders))
            yield from (_answer(folder, name, request) for folder in done)
            # A toolkit that crashed did so on the graph behind; those behind that one get a new process.
            if len(done) < len(folders):
                yield ExportError(complaint)
            folders = folders[len(done) + 1 :]


def _answered(folder: Path) -> bool:
    return (folder / "report.json").is_file() or (folder / "refused.txt").is_file()


def _answer(folder: Path, name: str, request: Request) -> Sequence[Execution] | ExportError:
    refused = folder / "refused.txt"
    if not refused.is_file():
        return list(_read_executions(folder, request, ""))
    return ExportError(f"{name} refuses the graph: {_complaint(refused)}")


def _command(name: str, module: str, requirement: str) -> list[str]:
    python = interpreter(name, module)
    if python is None:
        raise ExportError(how_to_install(name, requirement))
    return [python, str(PROGRAMS / f"{name}_program.py")]


def _write_job(folder: Path, content: bytes, feeds: Sequence[Feed], request: Request) -> None:
    import numpy as np

    (folder / "model.onnx").write_bytes(content)
    if request != Request():
        (folder / "request.json").write_text(json.dumps(request.document()), encoding="utf-8")
    if feeds:
        stacked = {name: np.stack([feed[name] for feed in feeds]) for name in feeds[0]}
        np.savez(folder / "feeds.npz", allow_pickle=False, **stacked)


def _read_executions(folder: Path, request: Request, loading: str) -> Iterator[Execution]:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for i, entry in enumerate(report):
        kept = dict.fromkeys(_keep(folder, entry, request), loading)
        yield Execution(
            setting=entry["setting"],
            outputs=_outputs(folder / f"outputs_{i}.npz"),
            products=entry["products"],
            elsewhere=tuple(entry["elsewhere"]),
            estimate=_estimate(entry, kept),
            kept=kept,
        )


def _outputs(path: Path) -> list[Any]:
    import numpy as np

    if not path.is_file():
        return []
    with np.load(path, allow_pickle=False) as archive:
        # The first output, whether it has a name or not.
        return list(archive[archive.files[0]])


def _estimate(entry: Mapping[str, Any], kept: Mapping[str, str]) -> CycleEstimate | None:
    if entry.get("estimate") is None:
        return None
    return CycleEstimate(
        **entry["estimate"], products=entry["products"], elsewhere=tuple(entry["elsewhere"]), kept=kept
    )


def _keep(folder: Path, entry: Mapping[str, Any], request: Request) -> list[str]:
    kept: list[str] = []
    if request.keep is None:
        return kept
    for name in entry.get("kept", ()):
        # A program names files of its own folder only.
        source, target = folder / Path(name).name, request.keep / Path(name).name
        shutil.copyfile(source, target)
        kept.append(str(target))
    return kept


def _run(command: list[str], folder: Path, name: str, seconds: float) -> str:
    """Run a program; return why the report of ``folder`` is missing, and nothing where it is there."""
    # A file, not a pipe: a toolkit's own children may keep a pipe open for ever.
    log = folder / "log.txt"
    with log.open("wb") as stream:
        try:
            done = subprocess.run(  # toolkits leave files in the folder where they run
                command, cwd=folder, stdout=stream, stderr=subprocess.STDOUT, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return f"{name} took longer than {seconds:g} s; export a smaller batch, or leave this runtime out"
        except OSError as error:
            raise ExportError(
                f"cannot run {command[0]}: {error}; check QINVERT_{name.upper()}_PYTHON"
            ) from None
    if done.returncode or not (folder / "report.json").is_file():
        return f"{name} refuses the graph (exit code {done.returncode}): {_complaint(log)}"
    return ""


def _complaint(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " | ".join(line.strip() for line in lines[-COMPLAINT_LINES:])
