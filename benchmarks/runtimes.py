"""Time exported graphs on onnxruntime and OpenVINO, and what they compete with, in one run."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from contenders import ELIMINATION, RUNTIMES, Case, contenders, graph, programs
from page import Row, page
from profiling import operator_seconds
from timing import interleaved

from qinvert.export.exporting import serialize
from qinvert.profiles import PROFILES
from qinvert.program.ports import MATRIX
from qinvert.stress import stress_matrices

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
#: Calls in a row, so that caches are warm, and seconds between two turns.
REPEAT, PAUSE = 5, 0.02
#: Graphs whose time is split by operator.
SPENT = ["npu-qdq-uint8", f"qlinear-uint8{ELIMINATION}", "int-ops-x86"]


def measure(case: Case, profiles: list[str], rounds: int, limit: float) -> list[Row]:
    """Time every contender of a case."""
    torch.set_num_threads(case.threads)
    times = interleaved(contenders(case, profiles), rounds, repeat=REPEAT, pause=PAUSE, limit=limit)
    return [
        Row(case=case, contender=name, runtime=runtime, best=min(t), median=statistics.median(t))
        for (name, runtime), t in times.items()
    ]


def export_seconds(profile: str) -> tuple[float, int, int]:
    """Return the seconds that one layer takes to export, its nodes and its bytes."""
    graph(64, 1, profile)  # plans, once
    start = time.perf_counter()
    model = graph(64, 64, profile)
    content = serialize(model)
    return time.perf_counter() - start, len(model.graph.node), len(content)


def spent(profile: str, batch: int) -> dict[str, tuple[int, float]]:
    """Return nodes and microseconds per matrix by operator, for onnxruntime on one thread."""
    lower = stress_matrices("correlated_keys", batch, 64, seed=1)
    found = operator_seconds(serialize(graph(64, batch, profile)), {MATRIX: -lower[None].numpy()})
    return {operator: (count, 1e6 * value / batch) for operator, (count, value) in found.items()}


def main() -> None:
    """Measure, print the page, and write it if told to."""
    arguments = parse()
    for runtime in RUNTIMES:
        if not find_spec(runtime):
            print(f"{runtime} is not installed: its rows are left out", file=sys.stderr)
    rows: list[Row] = []
    for case in cases(arguments):
        rows += measure(case, arguments.profiles, arguments.rounds, arguments.limit)
        print(f"{case}: {len(rows)} rows", file=sys.stderr)
    content = page(
        rows,
        {profile: export_seconds(profile) for profile in arguments.profiles},
        {profile: spent(profile, max(arguments.batches)) for profile in arguments.spent},
        [program.title for program in programs(64).values()],
    )
    print(content)
    if arguments.write:
        PAGE.write_text(content)


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Return every setting; with several threads the largest batch is also cut into one share per thread."""
    found = []
    for chunk in arguments.chunks:
        for threads in arguments.threads:
            found += [Case(chunk=chunk, batch=batch, threads=threads) for batch in arguments.batches]
        if max(arguments.threads) > 1:
            largest = max(arguments.batches)
            found.append(Case(chunk=chunk, batch=largest, threads=1, calls=max(arguments.threads)))
    return found


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), choices=list(PROFILES))
    graphs = [profile + suffix for profile in PROFILES for suffix in ("", ELIMINATION)]
    parser.add_argument("--spent", nargs="*", default=SPENT, choices=graphs, help="profiled by node")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--limit", type=float, default=0.2, help="seconds for one contender of one case")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
