"""What `runtimes.py` measured, as a page."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from contenders import DOUBLING, RUNTIMES, SOLVE, Case, split

from qinvert.documents import markdown
from qinvert.profiles import PROFILES

#: What decides how fast a CPU multiplies int8.
INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8")
HEAD = """# Benchmarks
Written by `make bench` (`benchmarks/runtimes.py --write`) on {date}.
{machine}.

Numbers are microseconds per matrix, from float32 M to float32 T, on buffers that exist already. Each is
the least of many calls; five calls follow one another, and all contenders take turns. In brackets: how
many times faster than the dense float32 doubling graph on the same runtime. Columns are matrices /
threads; `2 x 1` is two calls at the same time, each with one thread and half of the matrices. Every
profile exports the same two programs, `{program}` and, in rows that say so, `{other}`.
`fp32 row loop` is the row-by-row loop of published model code as an exporter unrolls it; it ran on
onnxruntime only.
"""
FASTEST = """
At C = 32 the gain is small: most products are of 16 x 16 blocks, and for each of them the call of a
kernel costs more than its arithmetic. `solve_triangular` needs half the arithmetic of one dense product,
in one pass through memory, where doubling needs ten products at C = 64. The products of a merge alone
take longer than the whole of `solve_triangular` (see below). Graphs of MatMuls are for hardware that runs
nothing else. In onnxruntime, Slice, Concat and masks run on one thread whatever the setting is, and a
product of 16 x 16 is a task of its own, too short for a second thread to help much. That is why two calls
at the same time use two threads better than one call does. At C = 64 elimination inside tiles takes 22
products for each matrix, and the merge 30. Masks by Where and identities by Max, in `qlinear-uint8`, take
less time than quantized Mul and Add.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one contender took in one case."""

    case: Case
    #: What computed, and on what.
    contender: str
    runtime: str
    #: Least and median seconds of a call.
    best: float
    median: float

    @property
    def microseconds(self) -> float:
        """Least time, per matrix."""
        return 1e6 * self.best / self.case.batch


def page(
    rows: list[Row],
    exports: Mapping[str, tuple[float, int, int]],
    spent: Mapping[str, Mapping[str, tuple[int, float]]],
    titles: Sequence[str],
) -> str:
    """Return the whole page; ``titles`` are those of the two programs."""
    date, (program, other) = datetime.now(UTC).strftime("%Y-%m-%d"), titles
    parts = [HEAD.format(date=date, machine=machine(), program=program, other=other)]
    chunks = dict.fromkeys(row.case.chunk for row in rows)
    parts += [f"## C = {chunk}\n{_table(rows, chunk)}" for chunk in chunks]
    parts.append(f"## The fastest graphs\n{_fastest(rows)}{FASTEST}")
    parts.append(f"## Where the time goes\n{_spent(rows, spent)}")
    parts.append(f"## Export of one layer, 64 matrices of 64 x 64\n{_exports(exports)}")
    return "\n".join(parts)


def machine() -> str:
    """Name of the CPU, its integer instructions, and the versions of everything timed."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in INSTRUCTIONS if flag in facts.get("flags", "").split()]
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", *RUNTIMES) if find_spec(name)]
    name = facts.get("model name", platform.machine())
    return f"{name}, {os.cpu_count()} cores, {' '.join(flags)}; {', '.join(versions)}"


def _table(rows: list[Row], chunk: int) -> str:
    times = {(row.contender, row.runtime, row.case): row.microseconds for row in rows}
    cases = [case for case in dict.fromkeys(row.case for row in rows) if case.chunk == chunk]
    lines = [["what", "on", *(f"{case.batch} / {case.workers}" for case in cases)]]
    for name, runtime in dict.fromkeys((row.contender, row.runtime) for row in rows):
        cells = []
        for case in cases:
            reference = times.get((DOUBLING, runtime, case), 0.0)
            value = times[name, runtime, case]
            cells.append(f"{value:.1f}" + (f" ({reference / value:.1f}x)" if reference else ""))
        lines.append([name, runtime, *cells])
    return markdown(lines)


def _fastest(rows: list[Row]) -> str:
    """Return what the fastest graph of every case of the largest batch is worth."""
    lines = [["case", "on", "graph", "microseconds", "fp32 doubling / it", "solve_triangular / it"]]
    largest = max(row.case.batch for row in rows)
    for case in dict.fromkeys(row.case for row in rows if row.case.batch == largest):
        found = [row for row in rows if row.case == case]
        times = {(row.contender, row.runtime): row.microseconds for row in found}
        for runtime in dict.fromkeys(row.runtime for row in found if row.runtime in RUNTIMES):
            graphs = [row for row in found if row.runtime == runtime and split(row.contender)[0] in PROFILES]
            best = min(graphs, key=lambda row: row.microseconds)
            ratios = [times[key] / best.microseconds for key in ((DOUBLING, runtime), (SOLVE, "torch"))]
            cells = [f"{value:.2f}" for value in (best.microseconds, *ratios)]
            lines.append([str(case), runtime, f"`{best.contender}`", *cells])
    return markdown(lines)


def _spent(rows: list[Row], spent: Mapping[str, Mapping[str, tuple[int, float]]]) -> str:
    lines = [["profile", "operator", "nodes", "microseconds per matrix"]]
    for profile, found in spent.items():
        counts, values = zip(*found.values(), strict=True)
        lines.append([f"`{profile}`", "all", str(sum(counts)), f"{sum(values):.2f}"])
        lines += [["", name, str(n), f"{value:.2f}"] for name, (n, value) in found.items()]
    return markdown(lines) + "\n".join(["", *_bounds(rows, spent)])


def _bounds(rows: list[Row], spent: Mapping[str, Mapping[str, tuple[int, float]]]) -> list[str]:
    """Return how the products alone compare with solve_triangular, both on one thread."""
    cases = [row.case for row in rows if (row.case.chunk, row.case.threads, row.case.calls) == (64, 1, 1)]
    if not cases:
        return []
    largest = max(cases, key=lambda case: case.batch)
    (solve,) = [row.microseconds for row in rows if row.case == largest and row.contender == SOLVE]
    lines = []
    for profile, found in spent.items():
        products = sum(value for name, (_, value) in found.items() if "MatMul" in name)
        total = sum(value for _, value in found.values())
        lines.append(
            f"`{profile}`: the products alone take {products:.1f} of {total:.1f} us per matrix, "
            f"solve_triangular takes {solve:.1f} us on one thread.\n"
        )
    return lines


def _exports(exports: Mapping[str, tuple[float, int, int]]) -> str:
    lines = [["profile", "seconds", "nodes", "bytes"]]
    for profile, (seconds, nodes, size) in exports.items():
        lines.append([f"`{profile}`", f"{seconds:.2f}", str(nodes), f"{size:,}"])
    return markdown(lines)
