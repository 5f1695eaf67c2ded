"""Commands that are killed at random moments, and what they leave."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
from hosts import host

from qinvert.errors import QInvertError
from qinvert.plan.plan import Plan
from qinvert.temporaries import GRACE, SUFFIX

#: Sequences that calibration reads: enough to be killed in the middle.
SEQUENCES: Final = "4"
#: Layer of the embedded model that the host's node takes.
LAYER: Final = "model.layers.0.linear_attn"
#: The model that is grafted, and the folder of the system's temporary files.
HOST: Final = "host.onnx"
SYSTEM: Final = "system"
#: What a process runs.
PLAIN: Final = "from qinvert.cli.app import cli; cli()"
BESIDE: Final = f"import qinvert.export.whole_models.export_model as m; m.MAX_BYTES = 1; {PLAIN}"


@dataclass(kw_only=True)
class Command:
    """One command line."""

    arguments: tuple[str, ...]
    #: Whether its weights go to a file of their own: then the limit for that is low.
    beside: bool = False
    #: How long its last whole run took.
    seconds: float = 0.0

    def start(self, folder: Path) -> subprocess.Popen[bytes]:
        """Run the command in a folder."""
        return subprocess.Popen(
            [sys.executable, "-c", BESIDE if self.beside else PLAIN, *self.arguments, "--quiet"],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "TMPDIR": str(folder / SYSTEM),
            },
        )

    def complete(self, folder: Path) -> int:
        """Run it to its end, measure it, and return its exit code."""
        start = time.monotonic()
        code = self.start(folder).wait()
        self.seconds = time.monotonic() - start
        return code


def commands(whole: bool) -> list[Command]:
    """Commands in the order in which each finds what it needs; whole models take seconds longer."""
    recall = ("calibrate", "recall", "--sequences", SEQUENCES)
    lines = [
        (*recall, "-o", "plan.json"),
        (*recall, "-o", "other.json", "--checkpoint", "checkpoint.npz"),
        ("export", "plan.json", "-o", "graphs"),
        ("export", "plan.json", "-o", "graphs", "--one-file"),
    ]
    found = [Command(arguments=line) for line in lines]
    if whole:
        model = ("export-model", "plan.json", "-o")
        grafted = ("graft", HOST, "plan.json", "--layer", f"attention={LAYER}", "-o")
        found += [
            Command(arguments=(*model, "model.onnx")),
            Command(arguments=(*model, "large.onnx", "--no-check"), beside=True),
            Command(arguments=(*grafted, "grafted.onnx")),
            Command(arguments=(*grafted, "large-grafted.onnx"), beside=True),
        ]
    return found


def run(count: int, seed: int, whole: bool, report: Callable[[str], None]) -> int:
    """Kill commands ``count`` times and return the number of faults."""
    faults = 0
    with tempfile.TemporaryDirectory(prefix="qinvert-kills-") as name:
        folder, every = Path(name), commands(whole)
        (folder / SYSTEM).mkdir()
        (folder / HOST).write_bytes(host())
        for command in every:
            code = command.complete(folder)
            if code:
                report(f"{' '.join(command.arguments)} ends with {code}")
                return 1
        for i in range(seed, seed + count):
            rng = random.Random(i)
            command = rng.choice(every)
            process = command.start(folder)
            time.sleep(rng.uniform(0, command.seconds))
            process.kill()
            process.wait()
            for fault in broken(folder):
                faults += 1
                report(f"seed {i}: {' '.join(command.arguments)}: {fault}")
        left = len(temporaries(folder))
        age(folder)
        for command in every:
            command.complete(folder)
        rest = [path.name for path in (*temporaries(folder), *(folder / SYSTEM).iterdir())]
        rest += surplus(folder)
        report(f"{count} kills left {left} temporaries, of which {len(rest)} outlive the next run")
    return faults + len(rest)


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
