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

A line for every fault names its seed, and ``--only SEED`` runs it alone.  The
exit code is 1 if there is a fault.  A line a minute on stderr says how far it is;
``--minutes`` ends it early, and its last lines count what was done.  Several of
them, each from another ``--seed``, use several cores.  A share of the models for `graft` that are
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
from collections import Counter
from collections.abc import Callable, Iterator
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
#: Cases that one process runs before a new one takes its place.
CASES: Final = 200
#: Share of the models for graft that are traced.
TRACED: Final = 0.002
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
    parser.add_argument("--minutes", type=float, default=math.inf, help="the time after which it ends early")
    parser.add_argument("--whole", action="store_true", help="kill export-model, too")
    given = parser.parse_args()
    faults = {"files": files, "values": values, "steps": steps, "kills": kills}[given.mode](given)
    print(f"{faults} faults")
    sys.exit(1 if faults else 0)


def files(given: argparse.Namespace) -> int:
    """Run mutated files in processes of their own, and return the number of faults."""
    first = given.seed if given.only is None else given.only
    last = first + (1 if given.only is not None else int(given.count))
    print(f"files, seeds {first} to {last - 1}: at most {SECONDS:.0f} s and {MEGABYTES} MB each", flush=True)
    context, outcomes, faults, at = multiprocessing.get_context("spawn"), Counter[str](), 0, first
    clock = Clock(given.minutes)
    with tempfile.TemporaryDirectory(prefix="qinvert-soak-") as folder:
        while at < last and clock.runs(f"{at - first:,} of {last - first:,} files, {faults} faults"):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(target=work, args=(at, min(at + CASES, last), folder, sender))
            worker.start()
            sender.close()
            for seed, outcome, fault in _answers(receiver, worker, at):
                outcomes[outcome] += 1
                if fault:
                    faults += 1
                    print(f"seed {seed}: {fault}", flush=True)
                at = seed + 1
            worker.join()
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:7d} {outcome}")
    print(f"{at - first:,} files, seeds {first} to {at - 1}")
    return faults


class Clock:
    """What says once a minute how far a run is, and when its time is over."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.next = time.monotonic() + 60

    def runs(self, done: str) -> bool:
        """Whether time is left."""
        now = time.monotonic()
        if now >= self.next:
            self.next = now + 60
            print(done, file=sys.stderr, flush=True)
        return now < self.end


def _answers(receiver: Any, worker: Any, first: int) -> Iterator[tuple[int, str, str]]:
    """Yield what a worker says of every case; a worker that dies or hangs says it by that."""
    seed, started = first, time.monotonic()
    # A fresh process imports torch and makes its files first.
    limit = 4 * SECONDS
    while True:
        if not receiver.poll(max(0.0, started + limit - time.monotonic())):
            worker.kill()
            yield seed, "hang", f"took more than {limit:.0f} s"
            return
        try:
            answer = receiver.recv()
        except EOFError:
            if worker.exitcode or worker.join() or worker.exitcode:
                yield seed, "death", f"the process ended with {worker.exitcode}"
            return
        if answer is None:
            return
        seed, started, limit = answer[0] + 1, time.monotonic(), SECONDS
        yield answer


def work(first: int, last: int, folder: str, sender: Any) -> None:
    """Run cases in this process; the parent reads what became of each."""
    import logging

    import torch

    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(dir=folder))
    cases = Cases(place)
    for seed in range(first, last):
        sender.send((seed, *cases.run(seed)))
    sender.send(None)
    sender.close()


class Cases:
    """Legal files of every kind, and what reads them."""

    def __init__(self, folder: Path) -> None:
        import numpy as np
        from safetensors.numpy import save_file

        import qinvert
        from qinvert.stress import stress_matrices

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

        try:
            list(open_systems(path))
        except InputError:
            list(token_batches(path))

    def _graft(self, path: Path, rng: random.Random) -> None:
        import qinvert
        from qinvert.export.whole_models.linear_attention_nodes import find_nodes, load

        if rng.random() < TRACED:
            qinvert.graft(path, self.plan, self.folder.parent / "grafted.onnx", layers={"attention": "a"})
        else:
            find_nodes(load(path))


def values(given: argparse.Namespace) -> int:
    """Compare random plans with onnxruntime until so many values were compared; return the faults."""
    return _compared(given, random_case, compare)


def steps(given: argparse.Namespace) -> int:
    """Compare random plans of whole chunk steps, as `values` does."""
    return _compared(given, random_step, compare_step)


def _compared(given: argparse.Namespace, draw: Callable[[int], Any], compare: Callable[[Any], Found]) -> int:
    first = given.seed if given.only is None else given.only
    seed, compared, differing, faults = first, 0, 0, 0
    left_out = "" if MIXED in NARROW else f"; {MIXED} is left out: this processor saturates its sums"
    print(f"{given.mode}, from seed {seed} on{left_out}", flush=True)
    start, counts, clock = time.monotonic(), Counter[str](), Clock(given.minutes)
    wanted = 1 if given.only is not None else given.count
    while compared < wanted and clock.runs(f"{compared:,} of {wanted:,.0f} values, {faults} faults"):
        case = draw(seed)
        found = compare(case)
        compared, differing = compared + found.values, differing + found.mismatches
        counts[f"{case.profile} {case.plan.layer().program.name}"] += found.values
        if found.fault:
            faults += 1
            print(f"seed {seed}: {case.profile} {case.plan.layer()}: {found.fault}", flush=True)
        if given.only is not None:
            break
        seed += 1
    for name, count in sorted(counts.items()):
        print(f"{count:12,d} {name}")
    rate = compared / (time.monotonic() - start)
    seeds = f"seeds {first} to {seed - 1}"
    print(f"{compared:,} values of {seeds}, {differing} differ within reach, {rate:,.0f} a second")
    return faults


def kills(given: argparse.Namespace) -> int:
    """Kill commands at random moments, and return the number of faults."""
    runs = Clock(given.minutes).runs
    return run_kills(int(given.count), given.seed, given.whole, runs, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
