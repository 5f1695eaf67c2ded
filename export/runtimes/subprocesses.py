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
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from qinvert.errors import ExportError
from qinvert.export.runtimes.runtime import Execution, Feed, Runtime
from qinvert.numerics.law import Rounding

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
    seconds: float = 600,
) -> Runtime:
    """Return the runtime whose program is ``programs/<name>_program.py``.

    Parameters
    ----------
    name, summary, module, requirement, own_steps, inputs, reorders, rounding
        See `Runtime`.
    seconds : float
        Time limit for one graph.
    """
    return Runtime(
        name=name,
        execute=partial(_execute, name, module, requirement, seconds),
        summary=summary,
        module=module,
        requirement=requirement,
        own_steps=own_steps,
        inputs=inputs,
        reorders=reorders,
        rounding=rounding,
    )


def interpreter(name: str, module: str) -> str | None:
    """Interpreter that has the runtime, or None."""
    named = os.environ.get(f"QINVERT_{name.upper()}_PYTHON")
    if named:
        return named
    return sys.executable if find_spec(module) is not None else None


def _execute(
    name: str, module: str, requirement: str, seconds: float, content: bytes, feeds: Sequence[Feed]
) -> Iterator[Execution]:
    python = interpreter(name, module)
    if python is None:
        raise ExportError(
            f"{name} is not installed; run: pip install {requirement}, or set "
            f"QINVERT_{name.upper()}_PYTHON to the interpreter of an environment that has it"
        )
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_job(folder, content, feeds)
        _run([python, str(PROGRAMS / f"{name}_program.py"), str(folder)], folder, name, seconds)
        yield from _read_executions(folder)


def _write_job(folder: Path, content: bytes, feeds: Sequence[Feed]) -> None:
    import numpy as np

    (folder / "model.onnx").write_bytes(content)
    stacked = {name: np.stack([feed[name] for feed in feeds]) for name in feeds[0]}
    np.savez(folder / "feeds.npz", allow_pickle=False, **stacked)


def _read_executions(folder: Path) -> Iterator[Execution]:
    import numpy as np

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for i, entry in enumerate(report):
        with np.load(folder / f"outputs_{i}.npz", allow_pickle=False) as archive:
            outputs = list(archive["outputs"])
        yield Execution(
            setting=entry["setting"],
            outputs=outputs,
            products=entry["products"],
            elsewhere=tuple(entry["elsewhere"]),
        )


def _run(command: list[str], folder: Path, name: str, seconds: float) -> None:
    # A file, not a pipe: a toolkit's own children may keep a pipe open for ever.
    log = folder / "log.txt"
    with log.open("wb") as stream:
        try:
            done = subprocess.run(  # toolkits leave files in the folder where they run
                command, cwd=folder, stdout=stream, stderr=subprocess.STDOUT, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise ExportError(
                f"{name} took longer than {seconds:g} s; export a smaller batch, or leave this runtime out"
            ) from None
        except OSError as error:
            raise ExportError(
                f"cannot run {command[0]}: {error}; check QINVERT_{name.upper()}_PYTHON"
            ) from None
    if done.returncode or not (folder / "report.json").is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        complaint = " | ".join(line.strip() for line in lines[-COMPLAINT_LINES:])
        raise ExportError(f"{name} refuses the graph (exit code {done.returncode}): {complaint}")
