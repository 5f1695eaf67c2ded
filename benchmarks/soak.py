"""Long runs that look for faults: hostile files, and random plans against onnxruntime.

    python benchmarks/soak.py files --count 20000 --seed 0
    python benchmarks/soak.py values --count 200000000 --seed 0
    python benchmarks/soak.py steps --count 20000000 --seed 0
    python benchmarks/soak.py kills --count 300 --seed 0 --whole

*files* mutates plans, .npz and .safetensors files, and ONNX files for `verify` and
`graft`.  Each must be read, or be refused by a `QInvertError`: without another
exception, in `SECONDS`, within `MEGABYTES` above what the process takes at rest,
and with no file left behind.  *values* compares every value of random plans (any
method, format, scales, profile) with onnxruntime: none may differ where the
profile promises equality, and elsewhere each must lie within its reach.  *steps*
does so with random plans of whole chunk steps, over several calls that hand the
state on.

*kills* ends commands at random moments: all results must be whole, old or new, and
the next run must delete what was left.

``--processes N`` shares the work among processes with seeds of their own: process
*i* of *N* takes every *N*-th seed from the *i*-th on.  The summary is theirs together.
``--minutes`` ends it early, and the summary counts what was done.

A line for every fault names its seed, and ``--only SEED`` runs it alone.  The
exit code is 1 if there is a fault.  A share of the models for `graft` that are
legal (`TRACED`) is also traced, which takes seconds.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hosts import host
from kills import run as run_kills
from mutations import MUTATIONS, of_bytes
from random_plans import MIXED, NARROW, Found, compare, random_case
from random_steps import compare_step, random_step

#: Longest time of one case, and most memory above that of an idle process.
SECONDS: Final = 60.0
MEGABYTES: Final = 2048
#: Seconds between two lines of progress.
PROGRESS: Final = 30.0
#: Cases that one process runs before a new one takes its place.
CASES: Final = 200
#: Share of the models for graft that are traced, and longest time of one of them: a legal model
#: takes most of a minute on a busy core.
TRACED: Final = 0.002
TRACING_SECONDS: Final = 300.0
TRACING: Final = "tracing"
CHUNK: Final = 16


def main() -> None:
    """Run one mode, print what was found, and leave with 1 if that was a fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("files", "values", "steps", "kills"))
    parser.add_argument("--count", type=float, default=20_000, help="files, values, or kills")
    parser.add_argument("--seed", type=int, default=0, help="first seed; a case has a seed of its own")
    parser.add_argument("--only", type=int, help="the seed of a single case")
    parser.add_argument("--whole", action="store_true", help="kill export-model, too")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time after which it ends early")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the work")
    given = parser.parse_args()
    processes = 1 if given.only is not None else max(1, given.processes)
    ending = f", {int(given.count):,} {given.mode if given.mode in ('files', 'kills') else 'values'}"
    seed = given.seed if given.only is None else given.only
    print(f"{given.mode} from seed {seed} on{ending}, {processes} processes", flush=True)
    start, faults, counts = time.monotonic(), 0, Counter[str]()
    for share in _shares(given, processes):
        faults, counts = faults + share.faults, counts + share.counts
    for name, count in sorted(counts.items()):
        print(f"{count:15,d} {name}")
    seconds = time.monotonic() - start
    print(f"{sum(counts.values()):,} {given.mode} in {seconds:.0f} s")
    print(f"{faults} faults")
    sys.exit(1 if faults else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one process found."""

    faults: int
    counts: Counter[str]


def _shares(given: argparse.Namespace, processes: int) -> Iterator[Share]:
    """Run the mode in processes, and yield what each found; one that dies ends all."""
    settings = vars(given) | {"count": given.count / processes, "stride": processes}
    if given.mode in ("files", "kills"):
        settings["count"] = -(-int(given.count) // processes)
    first = given.seed if given.only is None else given.only
    parts = [argparse.Namespace(**settings | {"seed": first + i}) for i in range(processes)]
    if processes == 1:
        yield MODES[given.mode](parts[0])
        return
    # Processes that start processes are no daemons, as those of a multiprocessing.Pool are.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for done in as_completed([pool.submit(MODES[given.mode], part) for part in parts]):
            yield done.result()


class Progress:
    """Says now and then how far a process is, on standard error, and when its time is over."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.last = given, time.monotonic()
        self.end = self.last + 60 * given.minutes

    def __call__(self, done: float, seed: int) -> bool:
        """Print a line if the last one is old, and return whether time is left."""
        now = time.monotonic()
        if now - self.last >= PROGRESS:
            self.last = now
            self._report(done, seed)
        return now < self.end

    def _report(self, done: float, seed: int) -> None:
        print(f"{self.given.mode}: {done:,.0f} of {self.given.count:,.0f}, seed {seed}", file=sys.stderr)


def files(given: argparse.Namespace) -> Share:
    """Run mutated files in processes of their own."""
    seeds = [given.seed + i * given.stride for i in range(1 if given.only is not None else int(given.count))]
    context, outcomes, faults, at = multiprocessing.get_context("spawn"), Counter[str](), 0, 0
    progress = Progress(given)
    with tempfile.TemporaryDirectory(prefix="qinvert-soak-") as folder:
        while at < len(seeds) and progress(at, seeds[at]):
            receiver, sender = context.Pipe(duplex=False)
            part = seeds[at : at + CASES]
            worker = context.Process(target=work, args=(part, folder, sender))
            worker.start()
            sender.close()
            for seed, outcome, fault in _answers(receiver, worker, part):
                outcomes[outcome] += 1
                if fault:
                    faults += 1
                    print(f"seed {seed}: {fault}", flush=True)
                at += 1
                progress(at, seed)
            worker.join()
    return Share(faults=faults, counts=outcomes)


def _answers(receiver: Any, worker: Any, seeds: list[int]) -> Iterator[tuple[int, str, str]]:
    """Yield what a worker says of every case; a worker that dies or hangs says it by that."""
    waiting, started = list(seeds), time.monotonic()
    # A fresh process imports torch and makes its files first.
    limit = 4 * SECONDS
    while True:
        if not receiver.poll(max(0.0, started + limit - time.monotonic())):
            worker.kill()
            yield waiting[0], "hang", f"took more than {limit:.0f} s"
            return
        try:
            answer = receiver.recv()
        except EOFError:
            worker.join()
            if waiting:
                yield waiting[0], "death", f"the process ended with {worker.exitcode}"
            return
        if answer is None:
            return
        if answer == TRACING:
            limit = TRACING_SECONDS
            continue
        waiting.remove(answer[0])
        started, limit = time.monotonic(), SECONDS
        yield answer


def work(seeds: list[int], folder: str, sender: Any) -> None:
    """Run cases in this process; the parent reads what became of each."""
    import logging

    import torch

    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    cases = Cases(Path(tempfile.mkdtemp(dir=folder)), lambda: sender.send(TRACING))
    _limit_memory()
    for seed in seeds:
        sender.send((seed, *cases.run(seed)))
    sender.send(None)
    sender.close()


def _limit_memory() -> None:
    """Have what takes far too much memory fail before it takes that of the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    # Address space counts what is mapped and never touched, too.
    limit = pages * resource.getpagesize() + 2 * MEGABYTES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class Cases:
    """Legal files of every kind, and what reads them."""

    def __init__(self, folder: Path, tracing: Callable[[], None] = lambda: None) -> None:
        import numpy as np
        from safetensors.numpy import save_file

        import qinvert
        from qinvert.stress import stress_matrices

        self.tracing = tracing
        self.folder = folder / "work"
        self.folder.mkdir()
        self.lower = stress_matrices("correlated_keys", 4, CHUNK)
        self.plan = qinvert.calibrate(
            {"a": self.lower, "b": 0.5 * self.lower}, target="npu-qdq-int8", method="block_merge"
        )
        made = folder / "made"
        made.mkdir()
        self.plan.save(made / "plan.json")
        arrays = {"a": self.lower.numpy(), "b": 0.5 * self.lower.numpy()}
        np.savez_compressed(made / "L.npz", **arrays)
        save_file(arrays, made / "L.safetensors")
        qinvert.export(self.plan, made / "t.onnx", layer="a", batch=4)
        (made / "host.onnx").write_bytes(host())
        names = {"npz": "L.npz", "safetensors": "L.safetensors", "verify": "t.onnx", "graft": "host.onnx"}
        self.contents = {kind: (made / name).read_bytes() for kind, name in names.items()}
        self.contents["plan"] = (made / "plan.json").read_bytes()
        self.names = {**names, "plan": "plan.json"}
        self.readers: dict[str, Callable[[Path, random.Random], Any]] = {
            "plan": self._plan,
            "npz": self._arrays,
            "safetensors": self._arrays,
            "verify": lambda path, _: qinvert.verify(path, self.plan, self.lower, layer="a"),
            "graft": self._graft,
        }
        # The first use of each reader loads what it needs, which is no fault of a file.
        for kind, reader in self.readers.items():
            path = self.folder / self.names[kind]
            path.write_bytes(self.contents[kind])
            reader(path, random.Random(1))
            path.unlink()

    def run(self, seed: int) -> tuple[str, str]:
        """Return the outcome of one case, and the fault if there is one."""
        from qinvert.errors import QInvertError

        rng = random.Random(seed)
        kind = rng.choice(list(self.readers))
        mutate = of_bytes if rng.random() < 0.4 else MUTATIONS[kind]
        path = self.folder / self.names[kind]
        path.write_bytes(mutate(rng, self.contents[kind]))
        before, fault = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, ""
        try:
            self.readers[kind](path, rng)
            outcome = f"{kind}: read"
        except QInvertError:
            outcome = f"{kind}: refused"
        except BaseException as error:  # any other type is what this looks for
            outcome, fault = f"{kind}: foreign error", f"{kind}: {type(error).__name__}: {str(error)[:200]}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        left = [file.name for file in self.folder.iterdir() if file != path]
        if grown > MEGABYTES:
            fault = fault or f"{kind}: took {grown} MB"
        if left:
            fault = fault or f"{kind}: left {', '.join(left)}"
            for name in left:
                (self.folder / name).unlink()
        path.unlink()
        return outcome, fault

    def _plan(self, path: Path, _rng: random.Random) -> None:
        from qinvert.export.exporting import build
        from qinvert.plan.plan import Plan

        plan = Plan.load(path)
        for name, layer in plan.layers.items():
            str(layer.proof())
            build(plan, layer=name, batch=2)

    def _arrays(self, path: Path, _rng: random.Random) -> None:
        from qinvert.calibration.data.token_batches import token_batches
        from qinvert.calibration.sources import open_systems
        from qinvert.errors import InputError

        with warnings.catch_warnings():
            # A warning of a library says nothing that a reader of ours could use.
            warnings.simplefilter("error")
            try:
                list(open_systems(path))
            except InputError:
                list(token_batches(path))

    def _graft(self, path: Path, rng: random.Random) -> None:
        import qinvert
        from qinvert.export.whole_models.linear_attention_nodes import find_nodes, load

        if rng.random() < TRACED:
            self.tracing()
            qinvert.graft(path, self.plan, self.folder.parent / "grafted.onnx", layers={"attention": "a"})
        else:
            find_nodes(load(path))


def values(given: argparse.Namespace) -> Share:
    """Compare random plans with onnxruntime until so many values were compared."""
    return _compared(given, random_case, compare)


def steps(given: argparse.Namespace) -> Share:
    """Compare random plans of whole chunk steps, as `values` does."""
    return _compared(given, random_step, compare_step)


def _compared(
    given: argparse.Namespace, draw: Callable[[int], Any], compare: Callable[[Any], Found]
) -> Share:
    import torch

    torch.set_num_threads(1)
    if MIXED not in NARROW:
        print(f"{MIXED} is left out: this processor saturates its sums", flush=True)
    seed, compared, differing, faults = given.seed, 0, 0, 0
    counts, progress = Counter[str](), Progress(given)
    wanted = 1 if given.only is not None else given.count
    while compared < wanted and progress(compared, seed):
        case = draw(seed)
        found = compare(case)
        compared, differing = compared + found.values, differing + found.mismatches
        counts[f"{case.profile} {case.plan.layer().program.name}"] += found.values
        if found.fault:
            faults += 1
            print(f"seed {seed}: {case.profile} {case.plan.layer()}: {found.fault}", flush=True)
        if given.only is not None:
            break
        seed += given.stride
    seeds = f"seeds {given.seed} to {seed - given.stride} by {given.stride}"
    print(f"{compared:,} values of {seeds}, {differing} differ within reach", flush=True)
    return Share(faults=faults, counts=counts)


def kills(given: argparse.Namespace) -> Share:
    """Kill commands at random moments."""
    faults, counts = run_kills(
        range(given.seed, given.seed + int(given.count) * given.stride, given.stride),
        given.whole,
        Progress(given),
        lambda line: print(line, flush=True),
    )
    return Share(faults=faults, counts=counts)


MODES: Final[dict[str, Callable[[argparse.Namespace], Share]]] = {
    "files": files,
    "values": values,
    "steps": steps,
    "kills": kills,
}

if __name__ == "__main__":
    main()
