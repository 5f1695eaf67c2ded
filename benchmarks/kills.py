"""Commands that are killed at random moments, and what they leave.

Commands run in forks of a process that has imported everything, so that the time in
which they are killed is that of their work and not of their imports; every other
kill falls into the last part of it, where results are written.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from hosts import host

from qinvert.errors import QInvertError
from qinvert.plan.plan import Plan
from qinvert.temporaries import GRACE, SUFFIX

#: Sequences that calibration reads, and length of the traced sequence: the work is as small as can be.
SEQUENCES: Final = "1"
LENGTH: Final = "64"
#: Layer of the embedded model that the host's node takes.
LAYER: Final = "model.layers.0.linear_attn"
#: The model that is grafted, and the folder of the system's temporary files.
HOST: Final = "host.onnx"
SYSTEM: Final = "system"
#: The last part of a command's time, in which every other kill falls.
END: Final = 0.2
#: Arguments that tell commands of one verb apart.
MARKS: Final = (
    "--checkpoint",
    "--one-file",
    "model.onnx",
    "large.onnx",
    "grafted.onnx",
    "large-grafted.onnx",
)
#: What a count of runs that were not killed ends with.
ENDED: Final = ", ended before"
#: And of runs that failed, which is a fault.
FAILED: Final = ", failed"
#: What commands import late.
MODULES: Final = (
    "onnxruntime",
    "onnxscript",
    "torch.onnx._internal.exporter._core",
    "transformers.models.qwen3_5.modeling_qwen3_5",
    "qinvert.calibration.calibrate",
    "qinvert.cli.app",
    "qinvert.export.exporting",
    "qinvert.export.whole_models.export_model",
    "qinvert.export.whole_models.graft",
)
FORK: Final = multiprocessing.get_context("fork")


@dataclass(kw_only=True)
class Command:
    """One command line."""

    arguments: tuple[str, ...]
    #: Whether its weights go to a file of their own: then the limit for that is low.
    beside: bool = False
    #: How long its last whole run took.
    seconds: float = 0.0

    @property
    def title(self) -> str:
        """The verb and what tells it from others of the same verb."""
        return f"{self.arguments[0]} {' '.join(a for a in self.arguments if a in MARKS)}".strip()

    def start(self, folder: Path) -> Any:
        """Run the command in a folder, in a process of its own."""
        process = FORK.Process(target=self.work, args=(folder,))
        process.start()
        return process

    def work(self, folder: Path) -> None:
        """Run the command in this process, and end it."""
        import qinvert.export.whole_models.export_model as whole
        from qinvert.cli.app import cli

        os.chdir(folder)
        tempfile.tempdir = str(folder / SYSTEM)
        nothing = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nothing, stream)
        if self.beside:
            whole.MAX_BYTES = 1  # type: ignore[misc] # a limit that a small model exceeds, too
        cli([*self.arguments, "--quiet"])

    def complete(self, folder: Path) -> int:
        """Run it to its end, measure it, and return its exit code."""
        start = time.monotonic()
        process = self.start(folder)
        process.join()
        self.seconds = time.monotonic() - start
        return int(process.exitcode)


def commands(whole: bool) -> list[Command]:
    """Commands in the order in which each finds what it needs; whole models take seconds longer."""
    recall = ("calibrate", "recall", "--sequences", SEQUENCES, "--method", "elimination", "--bits", "8")
    lines = [
        (*recall, "-o", "plan.json"),
        (*recall, "-o", "other.json", "--checkpoint", "checkpoint.npz"),
        ("export", "plan.json", "-o", "graphs"),
        ("export", "plan.json", "-o", "graphs", "--one-file"),
    ]
    found = [Command(arguments=line) for line in lines]
    if whole:
        model = ("export-model", "plan.json", "--length", LENGTH, "-o")
        grafted = ("graft", HOST, "plan.json", "--layer", f"attention={LAYER}", "-o")
        found += [
            Command(arguments=(*model, "model.onnx", "--no-check")),
            Command(arguments=(*model, "large.onnx", "--no-check"), beside=True),
            Command(arguments=(*grafted, "grafted.onnx")),
            Command(arguments=(*grafted, "large-grafted.onnx"), beside=True),
        ]
    return found


def run(
    seeds: range, whole: bool, runs: Callable[[float, int], bool], report: Callable[[str], None]
) -> tuple[int, Counter[str]]:
    """Kill a command for every seed, or until ``runs`` ends it; return the number of faults, and kills.

    A command that had ended when its kill came is counted by itself, and run again.
    """
    faults, counts = 0, Counter[str]()
    _import_all()
    with tempfile.TemporaryDirectory(prefix="qinvert-kills-") as name:
        folder, every = Path(name), commands(whole)
        (folder / SYSTEM).mkdir()
        (folder / HOST).write_bytes(host())
        for command in every:
            code = command.complete(folder)
            if code:
                report(f"{' '.join(command.arguments)} ends with {code}")
                return 1, counts
        for i in seeds:
            if not runs(counts.total(), i):
                break
            command = _killed(every, random.Random(i), folder, counts)
            for fault in broken(folder):
                faults += 1
                report(f"seed {i}: {' '.join(command.arguments)}: {fault}")
        left = len(temporaries(folder))
        killed = sum(number for name, number in counts.items() if not name.endswith((ENDED, FAILED)))
        faults += sum(number for name, number in counts.items() if name.endswith(FAILED))
        age(folder)
        for command in every:
            if code := command.complete(folder):
                faults += 1
                report(f"{' '.join(command.arguments)} ends with {code} after the kills")
        rest = [path.name for path in (*temporaries(folder), *(folder / SYSTEM).iterdir())]
        rest += surplus(folder)
        report(f"{killed} kills left {left} temporaries, of which {len(rest)} outlive the next run")
    return faults + len(rest), counts


def _killed(every: list[Command], rng: random.Random, folder: Path, counts: Counter[str]) -> Command:
    """Start one of the commands until it is killed before its end."""
    command = rng.choice(every)
    while True:
        process, start = command.start(folder), time.monotonic()
        process.join(command.seconds * rng.uniform(rng.choice((0.0, 1.0 - END)), 1.0))
        # The first run is the slowest: what it took is no measure of the others.
        if process.exitcode == 0:
            command.seconds = time.monotonic() - start
        process.kill()
        process.join()
        if process.exitcode:
            # What fails by itself does not work on what a kill left.
            failed = process.exitcode > 0
            counts[f"{command.title}{FAILED if failed else ''}"] += 1
            return command
        counts[f"{command.title}{ENDED}"] += 1


def _import_all() -> None:
    """Import what commands use, without a computation: a fork has none of its parent's threads."""
    torch.set_num_threads(1)
    for name in MODULES:
        import_module(name)


def broken(folder: Path) -> list[str]:
    """What of the results is not whole."""
    found = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or any(part.endswith(SUFFIX) for part in path.parts):
            continue
        try:
            if path.suffix == ".json":
                Plan.load(path)
            elif path.suffix == ".onnx":
                onnx.checker.check_model(str(path))
        except (QInvertError, onnx.checker.ValidationError, OSError) as error:
            found.append(f"{path.name}: {str(error)[:100]}")
    return found


def surplus(folder: Path) -> list[str]:
    """Weights that no model names any more."""
    return [path.name for path in folder.glob("*.data") if not any(map(_names(path), folder.glob("*.onnx")))]


def _names(weights: Path) -> Callable[[Path], bool]:
    return lambda model: weights.name.encode() in model.read_bytes()


def temporaries(folder: Path) -> list[Path]:
    """What killed processes left."""
    return [path for path in folder.rglob("*") if path.name.endswith(SUFFIX)]


def age(folder: Path) -> None:
    """Have temporaries, and weights, look as if they had been left some time ago."""
    then = time.time() - 2 * GRACE
    for path in (*temporaries(folder), *folder.glob("*.data")):
        os.utime(path, (then, then))
