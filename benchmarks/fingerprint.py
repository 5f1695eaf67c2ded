"""Hash what the package computes, so that a refactoring can be shown to change nothing.

    OPENBLAS_NUM_THREADS=1 python benchmarks/fingerprint.py write before.json
    OPENBLAS_NUM_THREADS=1 python benchmarks/fingerprint.py write after.json
    python benchmarks/fingerprint.py compare before.json after.json

``write`` stores a SHA-256 under a name for every graph, simulation, plan, text and so on; the name starts
with its kind.  What the package refuses is also a result: its message is hashed as a ``refusal``.
``compare`` lists the names that differ or are on one side only, and exits with 1 if there are any.

Only public names are used, so that the same script runs before and after modules move.  Everything is
seeded and runs on one thread.  Scales come from float arithmetic, and files name the package's version, so
compare only runs of one machine, one environment and one version.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeAlias

import torch

import qinvert
from qinvert.methods import METHODS
from qinvert.profiles import PROFILES
from qinvert.stress import STRESS, stress_keys, stress_matrices

#: Matrices, and beta of every row.
Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]
Programs: TypeAlias = dict[str, qinvert.Program]

#: Sets on which every method stays within its grids; ``STRESS`` as a whole breaks some.
CALM: Final = ("independent_keys", "wide_gates", "correlated_keys", "small_random")
#: One set for each head of a layer.
HEADS: Final = (*CALM, "ones")
INPUTS: Final = ("L", "M", "keys")
OUTPUTS: Final = ("T", "integers")
#: Matrices per call of a graph, in turn.
BATCHES: Final = (2, 1, 3, 8)
KEY_SIZE: Final = 16
DTYPES: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: Beta and range that a proof assumes.
LIMITS: Final = ((None, 1.0), (1.0, 1.0), (0.25, 2.0))
STYLES: Final = ("aimet-2.0.0", "aimet-1.0.0", "ort")
#: Programs whose graphs are exported with every input and output, on every kind of grid.
WIDEST: Final = ("block_merge", "merge-tile", "merge-masked-corrected", "factored", "banded_residual")
#: Plans of several layers that the command line writes, each in its own process, with a style of encodings.
IN_FOLDERS: Final = (
    "layers/npu-qdq-int8",
    "layers/npu-qdq-uint8",
    "layers/factored-int16",
    "heads/int4",
)
#: Arguments of `qinvert.calibrate` by name: formats, scales, ranges, and the requantize form of a target.
GRIDS: Final[dict[str, dict[str, Any]]] = {
    "int8": {"bits": 8},
    "int8-divide": {"bits": 8, "target": "int-ops"},
    "int8-pow2": {"bits": 8, "scales": "pow2"},
    "int4": {"bits": 4},
    "int16": {"bits": 16},
    "int8x2": {"bits": "8x2"},
    "int4-pow2": {"bits": 4, "scales": "pow2"},
    "int16-pow2": {"bits": 16, "scales": "pow2"},
    "int8x2-pow2": {"bits": "8x2", "scales": "pow2"},
    "int8-percentile": {"bits": 8, "ranges": "percentile"},
    "int8-mse": {"bits": 8, "ranges": "mse", "target": "qlinear"},
    "ryzen": {"target": "ryzen-xint8"},
}
#: The first grids of `GRIDS`, one of each format.
MAIN: Final = tuple(GRIDS)[:6]
#: Grids that are widened one by one until a goal is met; slow where a program has many tensors.
MIXED: Final[dict[str, dict[str, Any]]] = {
    "mixed16": {"target": "npu-qdq-int16", "min_sqnr_db": 45.0},
    "mixed8x2": {"target": "int-ops", "min_sqnr_db": 45.0},
    "mixed16-pow2": {"target": "npu-qdq-int16", "min_sqnr_db": 38.0, "scales": "pow2"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan, and how much is made of it."""

    name: str
    plan: qinvert.Plan
    #: Whether every input and output is exported, or two pairs of them only.
    full: bool = False

    @property
    def turn(self) -> int:
        """A number that follows from the name: it spreads batches and inputs over the cases."""
        return zlib.crc32(self.name.encode())

    @property
    def first(self) -> qinvert.LayerPlan:
        """The first layer."""
        return next(iter(self.plan.layers.values()))


class Record:
    """Hashes by name."""

    def __init__(self, folder: Path) -> None:
        self.hashes: dict[str, str] = {}
        #: For files that the package writes; not part of any name.
        self.folder = folder

    def add(self, name: str, content: bytes | str) -> None:
        """Store the hash of a result under a name of its own."""
        if name in self.hashes:
            raise ValueError(f"two results are called {name!r}; give one of them another name")
        content = content.encode() if isinstance(content, str) else content
        self.hashes[name] = hashlib.sha256(content).hexdigest()

    def attempt(self, name: str, call: Callable[[], bytes | str]) -> bool:
        """Store what a call returns, or its message when it refuses; return whether it succeeded."""
        try:
            content = call()
        except qinvert.QInvertError as error:
            self.add(f"refusal/{name}", f"{type(error).__name__}: {error}")
            return False
        self.add(name, content)
        return True

    def written(self, write: Callable[[Path], Any]) -> bytes:
        """Return what ``write`` puts into a file."""
        path = self.folder / "result"
        write(path)
        return path.read_bytes()


def raw(values: torch.Tensor) -> bytes:
    """Return the bytes of a tensor; all NaN count as the same."""
    values = torch.where(values.isnan(), torch.full_like(values, torch.nan), values)
    return values.contiguous().view(torch.uint8).numpy().tobytes()


# What everything runs on.


@cache
def stress(name: str, count: int, chunk: int, seed: int) -> torch.Tensor:
    """Return matrices of a set; not to be written to."""
    return stress_matrices(name, count, chunk, seed)


@cache
def calibration_data(chunk: int, hard: bool) -> torch.Tensor:
    """Return matrices to calibrate on."""
    names, count = (tuple(STRESS), 1) if hard else (CALM, 4)
    return torch.cat([stress(name, count, chunk, 7) for name in names])


@cache
def keyed(chunk: int, seed: int) -> Pair:
    """Return matrices built from keys, with their beta."""
    keys = stress_keys(3, chunk, KEY_SIZE, seed)
    k, beta, decay = keys["k"], keys["beta"], keys["g"].cumsum(-1)
    decays = torch.exp((decay.unsqueeze(-1) - decay.unsqueeze(-2)).clamp(max=0))
    return torch.tril(beta.unsqueeze(-1) * (k @ k.mT) * decays, -1), beta


def some_beta(lower: torch.Tensor) -> torch.Tensor:
    """Return a beta for matrices that were not built with one; one is 0, one below the smallest."""
    beta = 0.05 + torch.rand(lower.shape[:-1], generator=torch.Generator().manual_seed(5))
    beta[..., 0], beta[..., -1] = 0.0, 2.0**-15
    return beta


def record_data(record: Record) -> None:
    """Hash the sets themselves."""
    for name, chunk in itertools.product(STRESS, (2, 16, 64)):
        record.add(f"matrices/{name}/C{chunk}", raw(stress_matrices(name, 3, chunk, seed=1)))
    for name, values in stress_keys(2, 16, KEY_SIZE, seed=1).items():
        record.add(f"matrices/stress_keys/{name}", raw(values))
    for name in STRESS:
        record.add(f"exact/{name}", raw(qinvert.exact_inverse(stress(name, 2, 32, 1))))


# Programs.


def merges(chunk: int) -> Programs:
    """Return block merges of every layout."""
    return {
        "merge-base1": qinvert.block_merge(chunk, base=1),
        "merge-base2": qinvert.block_merge(chunk, base=2),
        "merge-packed": qinvert.block_merge(chunk, base=min(8, chunk), layout="packed"),
        "merge-masked": qinvert.block_merge(chunk, layout="masked"),
        "merge-tile": qinvert.block_merge(chunk, base=2, tile=chunk // 2),
        "merge-corrected": qinvert.block_merge(chunk, corrections=1),
        "merge-tile-corrected": qinvert.block_merge(chunk, base=4, tile=chunk // 2, corrections=2),
        "merge-masked-corrected": qinvert.block_merge(chunk, base=1, layout="masked", corrections=1),
        "factored": qinvert.block_merge(chunk, factored=True),
        "factored-base1": qinvert.block_merge(chunk, base=1, factored=True),
        "factored-corrected": qinvert.block_merge(chunk, factored=True, corrections=1),
    }


def series(chunk: int) -> Programs:
    """Return other methods with other arguments than their defaults."""
    return {
        "neumann-1": qinvert.neumann(chunk, order=1),
        "neumann-3": qinvert.neumann(chunk, order=3),
        "banded-1": qinvert.banded_residual(chunk, order=1, steps=1),
        "banded-3": qinvert.banded_residual(chunk, order=3, steps=3),
        "newton-4": qinvert.newton_schulz(chunk, iterations=4),
    }


def defaults(chunk: int) -> Programs:
    """Return every method as it comes."""
    return {name: method(chunk) for name, method in METHODS.items()}


def record_programs(record: Record) -> None:
    """Hash texts, costs and float runs of programs, of more sizes than are planned."""
    for chunk in (2, 4, 8, 16, 32, 64, 128):
        programs = defaults(chunk) if chunk < 128 else {"block_merge": qinvert.block_merge(chunk)}
        if 8 <= chunk < 128:
            programs |= merges(chunk) | series(chunk)
        for name, program in programs.items():
            record.add(f"program/C{chunk}/{name}", f"{program.title}\n{program}\n{program.tensors}")
            costs = [str(program.cost(size)) for size in (1, 2, 4, 8)]
            record.add(f"cost/C{chunk}/{name}", "\n".join([str(program.cost()), *costs]))
            if chunk in (8, 32):
                _record_floats(record, f"C{chunk}/{name}", program)


def _record_floats(record: Record, name: str, program: qinvert.Program) -> None:
    for dtype, source in itertools.product(DTYPES, ("wide_gates", "negative_eigenvalues", "outlier")):
        lower = stress(source, 2, program.chunk, 2)
        result = program.run(lower, dtype, beta=some_beta(lower))
        record.add(f"float/{name}/{str(dtype).removeprefix('torch.')}/{source}", raw(result))


# Plans.


def cases() -> Iterator[Case]:
    """Plan every program on every format; the expensive ones on fewer."""
    for name, program in (defaults(16) | merges(16) | series(16)).items():
        widest = name in WIDEST
        yield from planned(f"C16/{name}", program, GRIDS | MIXED if widest else some(*MAIN), full=widest)
    for name, program in defaults(16).items():
        yield from planned(f"C16-hard/{name}", program, some("int8", "int16"), hard=True)
    for chunk in (2, 4, 8):
        for name, program in defaults(chunk).items():
            yield from planned(f"C{chunk}/{name}", program, some("int8"))
    for name, program in (defaults(32) | merges(32)).items():
        yield from planned(f"C32/{name}", program, some("int8", "int16"))
    yield from large()
    yield from chosen()


def large() -> Iterator[Case]:
    """Plan a few programs of the sizes that models have."""
    for name, program in merges(64).items():
        yield from planned(f"C64/{name}", program, some("int8-divide"))
    yield from planned("C64/block_merge", qinvert.block_merge(64), some(*MAIN))
    yield from planned("C64/banded_residual", qinvert.banded_residual(64), some("int8"))
    yield from planned("C64/neumann_doubling", qinvert.neumann_doubling(64), some("int8-divide"))
    tiled = qinvert.block_merge(128, base=2, tile=16, corrections=1)
    yield from planned("C128/merge", tiled, some("int8", "int8x2"))


def some(*names: str) -> dict[str, dict[str, Any]]:
    """Return grids by name."""
    return {name: GRIDS[name] for name in names}


def planned(
    name: str,
    program: qinvert.Program,
    grids: Mapping[str, dict[str, Any]],
    *,
    hard: bool = False,
    full: bool = False,
) -> Iterator[Case]:
    """Calibrate a program once for each kind of grid; every plan comes in both requantize forms, if legal."""
    source = keyed(program.chunk, 7) if "beta" in program.tensors else calibration_data(program.chunk, hard)
    for grid, options in grids.items():
        plan = qinvert.calibrate(source, method=program, **options)
        case = Case(name=f"{name}/{grid}", plan=plan, full=full)
        yield case
        yield from _other_form(case)


def _other_form(case: Case) -> Iterator[Case]:
    """Yield the same grids with the other requantize form, if that is legal."""
    given = case.first
    form = "divide" if given.requantize == "multiplier" else "multiplier"
    try:
        layer = qinvert.LayerPlan(program=given.program, tensors=given.tensors, requantize=form)
    except qinvert.PlanError:
        return
    plan = qinvert.Plan(layers={"layer": layer}, target=case.plan.target)
    yield Case(name=f"{case.name}-as-{form}", plan=plan)


def chosen() -> Iterator[Case]:
    """Plan what calibration chooses by itself, for one layer, for several, and per head."""
    for method in ("auto", *METHODS):
        plan = qinvert.calibrate(calibration_data(16, True), method=method)
        yield Case(name=f"chosen/{method}", plan=plan)
    for target in PROFILES:
        layers = {f"model.{i}.attn": stress(name, 4, 16, 3) for i, name in enumerate(CALM)}
        yield Case(name=f"layers/{target}", plan=qinvert.calibrate(layers, target=target))
    factored = {"first": keyed(16, 1), "second": keyed(16, 2)}
    for name in ("int8", "int8-divide", "int16", "int8-pow2"):
        plan = qinvert.calibrate(factored, factored=True, **GRIDS[name])
        yield Case(name=f"layers/factored-{name}", plan=plan)
    heads = torch.stack([stress(name, 4, 32, 4) for name in HEADS])
    for name in MAIN:
        plan = qinvert.calibrate({"attn": heads}, granularity="head", **GRIDS[name])
        yield Case(name=f"heads/{name}", plan=plan)


def record_plan(record: Record, case: Case) -> None:
    """Hash a plan as a file, as text, its cost, its proof, and its report on other data."""
    name, plan = case.name, case.plan
    record.add(f"plan/{name}", record.written(plan.save))
    record.add(f"plan/{name}/read", record.written(qinvert.Plan.load(record.folder / "result").save))
    record.add(f"text/{name}", str(plan))
    for i, layer in enumerate(plan.layers.values()):
        proofs = [str(layer.proof(limit, beta)) for limit, beta in LIMITS]
        record.add(f"proof/{name}/{i}", "\n".join([str(layer.proof()), *proofs]))
        record.add(f"cost/{name}/{i}", str(layer.cost()))
    record.add(f"report/{name}", str(qinvert.simulate(plan, other_data(case))))


def other_data(case: Case) -> dict[str, torch.Tensor | Pair]:
    """Return what a plan is reported on, by layer."""
    if case.name.startswith("heads/"):
        return {"attn": torch.stack([stress(name, 2, case.first.chunk, 8) for name in HEADS])}
    chunk = case.first.chunk
    source = keyed(chunk, 8) if "beta" in case.first.program.tensors else stress("wide_gates", 3, chunk, 8)
    return dict.fromkeys(case.plan.layers, source)


# Integers.


def record_simulations(record: Record, case: Case) -> None:
    """Hash the simulated inverses of every set, and of what else is legal to pass."""
    for i, layer in enumerate(case.plan.layers.values()):
        for source in STRESS if i == 0 else CALM:
            lower = stress(source, 2, layer.chunk, 9)
            result = layer.inverse(lower, some_beta(lower))
            record.add(f"simulation/{case.name}/{i}/{source}", raw(result))
        _record_other_inputs(record, f"{case.name}/{i}", layer)


def _record_other_inputs(record: Record, name: str, layer: qinvert.LayerPlan) -> None:
    lower, beta = keyed(layer.chunk, 10)
    record.add(f"simulation/{name}/keyed", raw(layer.inverse(lower, beta)))
    shaped = layer.inverse(lower.double().reshape(3, 4, *lower.shape[1:]).numpy(), beta.reshape(3, 4, -1))
    record.add(f"simulation/{name}/array", f"{shaped.shape} {shaped.dtype}".encode() + shaped.tobytes())
    record.attempt(f"simulation/{name}/hexagon", lambda: raw(layer.inverse(lower, beta, rounding="hexagon")))


# Graphs.


def interfaces(case: Case) -> list[dict[str, Any]]:
    """Return the options of export; the batch varies."""
    pairs = list(itertools.product(OUTPUTS, INPUTS))
    if not case.full:
        pairs = [("T", INPUTS[case.turn % 3]), ("integers", INPUTS[(case.turn + 1) % 3])]
    return [
        {
            "output": result,
            "input": source,
            "batch": BATCHES[(case.turn + i) % len(BATCHES)],
            **({"key_size": KEY_SIZE} if source == "keys" else {}),
        }
        for i, (result, source) in enumerate(pairs)
    ]


def title(options: Mapping[str, Any]) -> str:
    """Return the options of a graph as part of a name."""
    return f"{options['input']}-{options['output']}/batch-{options['batch']}"


def record_graphs(record: Record, case: Case) -> None:
    """Hash the graphs of every layer under every profile that can express it."""
    for layer, profile in itertools.product(case.plan.layers, PROFILES):
        for options in interfaces(case):
            done = _record_graph(record, case, layer, profile, options)
            if not done and options["output"] == "T":
                break  # the profile does not take its formats or scales, whatever the options are


def _record_graph(record: Record, case: Case, layer: str, profile: str, options: dict[str, Any]) -> bool:
    def write(path: Path) -> None:
        qinvert.export(case.plan, path, layer=layer, profile=profile, **options)

    name = f"graph/{case.name}/{layer}/{profile}/{title(options)}"
    return record.attempt(name, lambda: record.written(write))


def record_findings(record: Record, case: Case) -> None:
    """Hash what lint says of a plan's first graph: under its own profile, and for some under all others."""
    first = next(iter(case.plan.layers))

    def write(path: Path) -> None:
        qinvert.export(case.plan, path, layer=first, batch=2)

    if record.attempt(f"graph/{case.name}/{first}/target", lambda: record.written(write)):
        for profile in (None, *PROFILES) if case.full else (None,):
            findings = qinvert.export.lint(record.folder / "result", profile)
            record.add(f"lint/{case.name}/{profile or 'own'}", "\n".join(map(str, findings)))


def record_layers(record: Record, case: Case) -> None:
    """Hash models of several layers, the batch fixed and open."""
    for profile, result, source, batch in itertools.product(PROFILES, OUTPUTS, INPUTS, (2, None)):
        size = {"key_size": KEY_SIZE} if source == "keys" else {}
        options = {"output": result, "input": source, "batch": batch, **size}
        done = _record_model(record, case, profile, options)
        if not done and result == "T":
            break


def _record_model(record: Record, case: Case, profile: str, options: dict[str, Any]) -> bool:
    def write(path: Path) -> None:
        qinvert.export_layers(case.plan, path, profile=profile, **options)

    name = f"model/{case.name}/{profile}/{title(options)}"
    return record.attempt(name, lambda: record.written(write))


def record_folders(record: Record, case: Case) -> None:
    """Hash what the command line writes for a plan: graphs, encodings documents, all layers in one file."""
    for style in STYLES:
        _record_folder(record, f"{case.name}/{style}", case.plan, "--encodings", style)
    _record_folder(record, f"{case.name}/one-file", case.plan, "--one-file", "--output-type", "integers")


def _record_folder(record: Record, name: str, plan: qinvert.Plan, *options: str) -> None:
    path = record.folder / "plan.json"
    plan.save(path)
    with TemporaryDirectory() as folder:
        run_cli("export", str(path), "-o", folder, "--quiet", *options)
        for file in sorted(Path(folder).iterdir()):
            kind = "encodings" if ".encodings" in file.suffixes else "file"
            record.add(f"{kind}/{name}/{file.name}", file.read_bytes())


def run_cli(*arguments: str) -> None:
    """Run the command line of the package that is imported here."""
    environment = os.environ | {"PYTHONPATH": str(Path(qinvert.__file__).resolve().parent.parent)}
    command = [sys.executable, "-m", "qinvert.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")


# The command line.


def sources() -> str:
    """Return the hash of the package's modules."""
    found = hashlib.sha256()
    for folder, _, files in sorted(os.walk(Path(qinvert.__file__).parent, followlinks=True)):
        for file in sorted(file for file in files if file.endswith(".py")):
            found.update(f"{folder}/{file}".encode() + Path(folder, file).read_bytes())
    return found.hexdigest()


def fingerprint() -> dict[str, str]:
    """Return the hash of everything."""
    with TemporaryDirectory() as folder:
        record = Record(Path(folder))
        record_data(record)
        record_programs(record)
        for case in cases():
            record_plan(record, case)
            record_simulations(record, case)
            record_graphs(record, case)
            record_findings(record, case)
            if len(case.plan.layers) > 1:
                record_layers(record, case)
            if case.name in IN_FOLDERS:
                record_folders(record, case)
        return record.hashes


def kinds(names: Any) -> str:
    """Return how many names there are, by kind."""
    counts = Counter(name.partition("/")[0] for name in names)
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items())) or "none"


def write(path: Path) -> int:
    """Compute everything and write it."""
    start, before = time.perf_counter(), sources()
    hashes = fingerprint()
    if sources() != before:
        # Modules load on first use, and the command line runs in processes of its own.
        raise RuntimeError(
            "the package was edited meanwhile: the results do not belong together; run it again"
        )
    path.write_text(json.dumps(hashes, indent=0, sort_keys=True) + "\n")
    seconds, cpu = time.perf_counter() - start, time.process_time()
    print(
        f"{qinvert.__file__}, version {qinvert.__version__}: {seconds:.0f} s, {cpu:.0f} s of them computing"
    )
    print(f"{len(hashes):,} names, {len(set(hashes.values())):,} different hashes: {kinds(hashes)}")
    return 0


def compare(first: Path, second: Path) -> int:
    """Print every name that differs, and return 1 if there is one."""
    before, after = json.loads(first.read_text()), json.loads(second.read_text())
    groups = {
        "differ": [name for name in before if name in after and before[name] != after[name]],
        f"are missing in {second}": [name for name in before if name not in after],
        f"are missing in {first}": [name for name in after if name not in before],
    }
    for what, names in groups.items():
        for name in names:
            print(f"{name}: {what}")
    equal = [name for name in before if before[name] == after.get(name)]
    print(f"{len(equal):,} names are equal: {kinds(equal)}")
    for what, names in groups.items():
        print(f"{len(names):,} {what}: {kinds(names)}")
    return int(any(groups.values()))


def main() -> None:
    """Write a file, or compare two."""
    kept = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kept)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("write", help="compute everything").add_argument("file", type=Path)
    comparing = verbs.add_parser("compare", help="list what differs; exit code 1 if anything does")
    comparing.add_argument("files", type=Path, nargs=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.exit(write(arguments.file) if arguments.verb == "write" else compare(*arguments.files))


if __name__ == "__main__":
    main()
