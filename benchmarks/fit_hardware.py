"""Fits the tables of `qinvert.hardware`: cycles of many graphs, and the weights that predict them.

    python benchmarks/fit_hardware.py hexagon-v81 --cases 200 --cache cycles.jsonl

Every graph goes through the chip's compiler, or is timed on this processor.
The weights minimize the squared relative error and are not negative; 30 graphs
are left out of the fit, and the printed error and rank correlation are theirs.
The cache holds what was measured, so that a run can be continued.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls
from scipy.stats import spearmanr

import qinvert
from qinvert.errors import QInvertError
from qinvert.export.exporting import build, serialize
from qinvert.export.runtimes import estimate
from qinvert.export.runtimes.onnxruntime_cpu import open_session
from qinvert.hardware import find_hardware
from qinvert.hardware._hardware import known_features
from qinvert.methods import block_merge, elimination, neumann, neumann_doubling
from qinvert.plan.plan import Plan
from qinvert.program.program import Program
from qinvert.program.residual_sums import residuals_as_sums
from qinvert.stress import stress_matrices

#: Graphs that are left out of a fit.
HELD_OUT = 30
#: Matrices from which the grids of the plans come.
MATRICES = 32
#: Batch and chains of the graphs.
CALLS = ((1, 1), (8, 1), (8, 2), (8, 8), (16, 16), (32, 1), (64, 1), (64, 8))
#: Smaller matrices are not whole tiles of the units that multiply, and cost more than larger ones.
CHUNKS = (32, 64, 128)
#: How much more the errors of eight matrices of 64 tokens count, the size that most models have.
USUAL = 3.0
#: Calls of which the fastest is taken, where processor time is measured.
CALLS_TIMED = 15
#: Features that are enough; with all of them, weights of few graphs are arbitrary.
FEATURES = (
    "call",
    "ends/KiB",
    "product",
    "product/matrix",
    "product/Mmac",
    "new right/matrix",
    "new right/KiB",
    "elementwise",
    "elementwise/matrix",
    "elementwise/KiB",
    "move",
    "move/matrix",
    "move/KiB",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One graph."""

    program: Program
    target: str
    batch: int
    chains: int

    @property
    def key(self) -> str:
        """Name in the cache."""
        return f"{self.program.title} {self.target} batch={self.batch} chains={self.chains}"


def programs(chunk: int) -> Iterator[Program]:
    """Yield what the tables must tell apart."""
    yield elimination(chunk)
    yield elimination(chunk, corrections=1)
    yield elimination(chunk, restart=3)
    yield block_merge(chunk, 1, layout="masked")
    yield block_merge(chunk, 2, layout="masked")
    yield block_merge(chunk, 4)
    yield block_merge(chunk, 16)
    yield block_merge(chunk, 2, tile=16)
    yield neumann(chunk, order=3)
    yield neumann_doubling(chunk)
    sums = (
        elimination(chunk),
        elimination(chunk, side="right"),
        elimination(chunk, side="right", radix=4),
        elimination(chunk, side="left", radix=4),
        elimination(chunk, restart=3),
        elimination(chunk, tile=16),
        block_merge(chunk, 1, layout="masked"),
        block_merge(chunk, 1, tile=16),
        block_merge(chunk, 1),
        block_merge(chunk, 4),
    )
    yield from map(residuals_as_sums, sums)


def cases(hardware: str, count: int, seed: int) -> list[Case]:
    """Return ``count`` graphs for the targets of a chip, drawn at random."""
    found = [
        Case(program=program, target=target, batch=batch, chains=chains)
        for chunk in CHUNKS
        for program in programs(chunk)
        for target in find_hardware(hardware).targets
        for batch, chains in CALLS
        if chains == 1 or hardware.startswith("hexagon")
    ]
    random.Random(seed).shuffle(found)
    return found[:count]


@lru_cache(maxsize=256)
def plan_of(title: str, target: str) -> Plan:
    """Return the plan of a program whose title is in `programs`."""
    program = next(p for chunk in CHUNKS for p in programs(chunk) if p.title == title)
    lower = stress_matrices("correlated_keys", MATRICES, program.chunk)
    bits = 16 if "int16" in target else 8
    return qinvert.calibrate(
        lower, method=program, target=target, bits=bits, min_sqnr_db=0.0, max_loss_db=1000.0
    )


def measured(hardware: str, selected: list[Case], cache: Path, offline: bool) -> dict[str, float]:
    """Return the cost of every graph that the chip's compiler takes, by the key of its case."""
    known: dict[str, float] = {}
    if cache.is_file():
        rows = [json.loads(line) for line in cache.read_text(encoding="utf-8").splitlines()]
        known = {row["case"]: row["cost"] for row in rows if row["hardware"] == hardware}
    for case in () if offline else selected:
        if case.key in known:
            continue
        plan = plan_of(case.program.title, case.target)
        try:
            model = build(
                plan,
                batch=case.batch,
                chains=case.chains,
                input="M",
                input_type="integers",
                output="integers",
            )
            known[case.key] = cost_of(serialize(model), hardware)
        except QInvertError as error:
            print(f"left out: {case.key}: {error}")
            continue
        row = {"hardware": hardware, "case": case.key, "cost": known[case.key]}
        with cache.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
    return {case.key: known[case.key] for case in selected if case.key in known}


def cost_of(content: bytes, hardware: str) -> float:
    """Return cycles by the chip's compiler, or processor nanoseconds of one thread."""
    if hardware == "cpu-onnxruntime":
        return onnxruntime_nanoseconds(content)
    if hardware == "cpu-openvino":
        return openvino_nanoseconds(content)
    return estimate(content, hardware).cycles


def onnxruntime_nanoseconds(content: bytes) -> float:
    """Return the least processor time of a call: what other processes take away does not count."""
    session = open_session(content, threads=1)
    (given,) = session.get_inputs()
    feed = {given.name: integers(given.shape, given.type.removeprefix("tensor(").removesuffix(")"))}
    return least_time(lambda: session.run(None, feed))


def openvino_nanoseconds(content: bytes) -> float:
    """As `onnxruntime_nanoseconds`, in OpenVINO, which must be installed beside this package."""
    import openvino

    core = openvino.Core()
    model = core.compile_model(
        core.read_model(content), "CPU", {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    )
    given = model.inputs[0]
    feed = integers(list(given.shape), given.element_type.to_dtype().name)
    request = model.create_infer_request()
    return least_time(lambda: request.infer([feed]))


def integers(shape: list[int], element: str) -> npt.NDArray[Any]:
    """Return integers around the zero point of an 8-bit type."""
    zero = 128 if element == "uint8" else 0
    return (np.random.default_rng(0).integers(-20, 20, shape) + zero).astype(element)


def least_time(run: Callable[[], Any]) -> float:
    """Return the least of a few calls in nanoseconds of processor time, all threads together."""
    run()
    times = []
    for _ in range(CALLS_TIMED):
        start = time.process_time_ns()
        run()
        times.append(time.process_time_ns() - start)
    return float(max(1, min(times)))


def width(case: Case) -> int:
    """Bytes of the tensors of a case."""
    return 2 if "int16" in case.target else 1


def fitted(
    rows: list[Mapping[str, float]], costs: npt.NDArray[Any], importance: npt.NDArray[Any]
) -> dict[str, float]:
    """Return the weights with the least squared relative error, none of them negative."""
    matrix = np.array([[row[name] for name in FEATURES] for row in rows])
    weights, _ = nnls(matrix * (importance / costs)[:, None], importance)
    return {name: float(f"{w:.4g}") for name, w in zip(FEATURES, weights, strict=True) if w > 0}


def predicted(weights: Mapping[str, float], row: Mapping[str, float]) -> float:
    """Return the cost of one graph."""
    return sum(weight * row[name] for name, weight in weights.items())


def show(hardware: str, selected: list[Case], costs: Mapping[str, float], seed: int) -> None:
    """Print the weights of every table, and how they predict the graphs that were left out."""
    held = set(random.Random(seed).sample(sorted(costs), min(HELD_OUT, len(costs) // 4)))
    tables: dict[tuple[int, bool], dict[str, float]] = {}
    rows = {
        c.key: known_features(plan_of(c.program.title, c.target).layer(), c.batch, c.chains) for c in selected
    }
    for key in sorted({(width(c), c.chains > 1) for c in selected}):
        mine = [c.key for c in selected if (width(c), c.chains > 1) == key and c.key in costs]
        used = [name for name in mine if name not in held]
        importance = np.array([USUAL if " batch=8 " in name and "chunk=64" in name else 1.0 for name in used])
        known = np.array([costs[name] for name in used])
        tables[key] = fitted([rows[name] for name in used], known, importance)
        print(f"{key[0]} bytes, {'chained' if key[1] else 'whole'}, {len(used)} graphs: {tables[key]}")
    pairs = [
        (costs[c.key], predicted(tables[width(c), c.chains > 1], rows[c.key]))
        for c in selected
        if c.key in held
    ]
    truth, guess = np.array(pairs).T
    errors = np.abs(guess / truth - 1)
    correlation = spearmanr(truth, guess).statistic
    print(
        f"{hardware}, {len(held)} graphs that were left out: mean error {errors.mean():.3f}, median "
        f"{np.median(errors):.3f}, rank correlation {correlation:.3f}"
    )


def main() -> None:
    """Measure, fit and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hardware")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("cycles.jsonl"))
    parser.add_argument("--offline", action="store_true", help="Fit what the cache holds.")
    options = parser.parse_args()
    selected = cases(options.hardware, options.cases, options.seed)
    costs = measured(options.hardware, selected, options.cache, options.offline)
    show(options.hardware, [c for c in selected if c.key in costs], costs, options.seed)


if __name__ == "__main__":
    main()
