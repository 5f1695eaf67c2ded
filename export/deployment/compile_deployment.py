"""Compiles both graphs of a deployed folder for a chip: what is not on it, and what a call costs there."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final

import onnx

from qinvert.errors import ExportError, lookup
from qinvert.export.deployment.manifest import DECODE, PREFILL, Manifest
from qinvert.export.exporting import serialize
from qinvert.export.runtimes import CycleEstimate, estimate, estimators, installed
from qinvert.export.runtimes.subprocesses import how_to_install
from qinvert.progress import track

#: A file that a compiler reads ends here, by protobuf's limit.
LARGEST: Final = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledGraph:
    """What a chip's compiler made of one of the two graphs."""

    #: ``prefill.onnx`` or ``decode.onnx``.
    file: str
    #: Name of the chip.
    hardware: str
    #: Tokens of a call.
    tokens: int
    #: Cycles of a call; None where the compiler refuses the graph.
    estimate: CycleEstimate | None = None
    #: Why it does, with the nodes that it leaves to the CPU where it says so.
    refused: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of a call over its simulated time, where the compiler tells that; nothing is measured."""
        time = None if self.estimate is None else self.estimate.microseconds
        return None if not time else self.tokens * 1e6 / time


def planned_chips(folder: str | PathLike[str]) -> tuple[str, ...]:
    """Return the chip that a folder was planned for, if its compiler is installed; else none."""
    chip = Manifest.load(folder).facts.get("hardware")
    runtime = estimators().get(chip) if isinstance(chip, str) else None
    return (chip,) if isinstance(chip, str) and runtime is not None and runtime.name in installed() else ()


def compile_deployment(
    folder: str | PathLike[str], hardware: str, *, keep: str | PathLike[str] | None = None
) -> list[CompiledGraph]:
    """Compile both graphs of a folder for a chip, with nothing left to the CPU.

    Cycles and times are simulated by the compiler; operators for which it has no cost are left out of them,
    and counted in ``estimate.uncosted``.

    Parameters
    ----------
    folder : path
        What `qinvert.deploy` wrote.
    hardware : str
        A key of `qinvert.export.runtimes.estimators`, such as ``"hexagon-v81"``.
    keep : path, optional
        Folder that gets what the compiler made, in a folder for each graph.

    Raises
    ------
    InputError
        If the folder is no deployment.
    ExportError
        If the chip is unknown, its toolkit is not installed or makes no file to keep, or a graph with its
        weights exceeds 2 GiB.
    """
    runtime = lookup(estimators(), hardware, "hardware", ExportError)
    if runtime.name not in installed():
        raise ExportError(how_to_install(runtime.name, runtime.requirement))
    if keep is not None and not runtime.loading:
        raise ExportError(f"{runtime.name} makes no file to keep; leave it out")
    manifest = Manifest.load(folder)
    graphs = {PREFILL: manifest.window, DECODE: 1}
    return [
        _compiled(Path(folder) / file, hardware, tokens, keep)
        for file, tokens in track(graphs.items(), "graphs", len(graphs))
    ]


def _compiled(path: Path, hardware: str, tokens: int, keep: str | PathLike[str] | None) -> CompiledGraph:
    kept = None if keep is None else Path(keep) / path.stem
    known: dict[str, Any] = {"file": path.name, "hardware": hardware, "tokens": tokens}
    content = _content(path)
    try:
        found = estimate(content, hardware, keep=kept, partial_costs=True)
    except ExportError as error:
        return CompiledGraph(**known, refused=str(error))
    return CompiledGraph(**known, estimate=found)


def _content(path: Path) -> bytes:
    """One file with all weights."""
    model = onnx.load(path)
    if model.ByteSize() > LARGEST:
        raise ExportError(
            f"{path} and its weights exceed the {LARGEST >> 20} MiB that one file can have; deploy with "
            "--weights w8"
        )
    return serialize(model)
