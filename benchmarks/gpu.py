"""Time fused kernels on a GPU against copies, libraries and the torch path, all in one run.

Writes the tables of docs/gpu.md between its markers, and a plot beside it.
Ratios within one run are what to quote.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.testing import do_bench

import qinvert
from qinvert.execution.simulator import simulate_batched
from qinvert.kernels import Precision, solve_tril
from qinvert.kernels.dispatch import EXACT
from qinvert.kernels.generator import float_program, program_kernel
from qinvert.kernels.launch import launch
from qinvert.plan.plan import LayerPlan
from qinvert.stress import stress_matrices
from qinvert.systems import Systems

Contender = Callable[[], Any]
Table = list[list[str]]
#: Elements of the largest batch.
MAX_ELEMENTS = 2**32
#: Elements of the largest batch of the contenders that take seconds.
MAX_SLOW_ELEMENTS = 2**27
BEGIN, END = "<!-- benchmarks/gpu.py writes from here -->", "<!-- to here -->"
TYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
)


def matrices(count: int, chunk: int, seed: int = 0) -> torch.Tensor:
    """Return L of correlated keys of unit length and uniform beta, on the GPU."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    lower = torch.empty(count, chunk, chunk, device="cuda")
    for part in lower.split(max(1, 2**25 // chunk**2)):
        shape = (len(part), chunk, 64)
        keys = torch.randn(shape, device="cuda", generator=generator)
        keys += 0.5 * torch.randn(len(part), 1, 64, device="cuda", generator=generator)
        keys = torch.nn.functional.normalize(keys, dim=-1)
        beta = torch.rand(len(part), chunk, 1, device="cuda", generator=generator)
        part.copy_((beta * (keys @ keys.mT)).tril(-1))
    return lower


def programs(chunk: int) -> dict[str, qinvert.Program]:
    """Return the programs that kernels in floating point are compared with."""
    return {
        "merge": qinvert.block_merge(chunk, base=1, tile=16),
        "elimination": qinvert.elimination(chunk, tile=16),
    }


@cache
def plans(chunk: int) -> dict[str, LayerPlan]:
    """Return the plans that are timed, those of both programs, and the planner's own choice."""
    seen = torch.cat([stress_matrices(n, 32, chunk) for n in ("correlated_keys", "independent_keys")])
    options: dict[str, dict[str, Any]] = {"int8, planner": {"bits": 8}}
    for program in (qinvert.block_merge(chunk, base=2, tile=16), qinvert.elimination(chunk, tile=16)):
        method, name = {"method": program}, program.name.removeprefix("block_")
        options |= {
            f"int8, {name}": {"bits": 8, **method},
            f"int8, divide, {name}": {"bits": 8, "target": "int-ops", **method},
            f"int4, {name}": {"bits": 4, **method},
            f"int8x2, {name}": {"bits": "8x2", **method},
            f"int8x2, pow2, {name}": {"bits": "8x2", "scales": "pow2", **method},
        }
    return {n: qinvert.calibrate(seen, min_sqnr_db=0, **o).layer() for n, o in options.items()}


def library() -> Callable[..., torch.Tensor] | None:
    """Return flash-linear-attention's function, None if it is not installed."""
    try:
        return importlib.import_module("fla.ops.utils.solve_tril").solve_tril
    except ImportError:
        return None


def microseconds(call: Contender) -> float:
    """Median time of one call."""
    return 1000 * do_bench(call, warmup=5, rep=25, return_mode="median")


def rows(lower: torch.Tensor) -> torch.Tensor:
    """Return matrices in the layout of `solve_tril`."""
    return lower.view(1, -1, 1, lower.shape[-1])


def float_call(
    given: torch.Tensor, target: torch.dtype, program: qinvert.Program, precision: str
) -> Callable[[], torch.Tensor]:
    """Return a call of a program's float kernel, which returns T."""
    exact = given.dtype in EXACT.get(Precision(precision), ())
    generated = program_kernel(program, Precision(precision), exact)
    A, out = rows(given), torch.empty_like(rows(given), dtype=target)  # noqa: N806

    def call() -> torch.Tensor:
        launch(generated, A, out)
        return out.view_as(given)

    return call


def contenders(lower: torch.Tensor, known: dict[str, LayerPlan]) -> Iterator[tuple[str, Contender]]:
    """Yield what is compared in float32."""
    chunk, A, out = lower.shape[-1], rows(lower), torch.empty_like(lower)  # noqa: N806
    yield "copy", lambda: out.copy_(lower)
    for precision in ("fp16", "tf32", "fp16x3"):
        for name, program in programs(chunk).items():
            yield f"{precision}, {name}", float_call(lower, lower.dtype, program, precision)
    for name, plan in known.items():
        yield name, partial(solve_tril, A, plan=plan)
    theirs = library()
    if theirs is not None and chunk <= 64:
        yield "flash-linear-attention", lambda: theirs(A)
    if lower.numel() <= MAX_SLOW_ELEMENTS:
        eye = torch.eye(chunk, device="cuda").expand(lower.shape)
        yield (
            "torch.linalg",
            lambda: torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True),
        )
        yield "simulator, torch path", lambda: simulate_batched(known["int8, merge"], Systems(lower=lower))


def warm(chunk: int, name: str) -> None:
    """Run one contender on a few matrices, which leaves its kernel in Triton's cache on the disk."""
    dict(contenders(matrices(64, chunk), plans(chunk)))[name]()


def compile_all(chunks: list[int]) -> None:
    """Compile all kernels, in as many processes as there are cores: the longest take minutes."""
    jobs = [(chunk, name) for chunk in chunks for name, _ in contenders(matrices(64, chunk), plans(chunk))]
    # A thread for each core in each process would keep them waiting for one another.
    with get_context("spawn").Pool(
        len(os.sched_getaffinity(0)), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        pool.starmap(warm, jobs[::-1], 1)


def by_size(chunks: list[int], batches: list[int]) -> dict[tuple[int, int], dict[str, float]]:
    """Nanoseconds per matrix of every contender by (chunk, batch)."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for chunk in chunks:
        known = plans(chunk)
        for batch in batches:
            if batch * chunk**2 <= MAX_ELEMENTS:
                lower = matrices(batch, chunk)
                calls = contenders(lower, known)
                found[chunk, batch] = {n: 1000 * microseconds(c) / batch for n, c in calls}
                print(chunk, batch, {n: round(t, 2) for n, t in found[chunk, batch].items()}, flush=True)
    return found


def by_type(batch: int) -> Table:
    """Nanoseconds per matrix of 64 x 64 and ratios, by types of input and output."""
    lower = matrices(batch, 64)
    truth = qinvert.exact_inverse(lower[:512])
    return [row for source, target in TYPES for row in _by_precision(lower.to(source), target, truth)]


def _by_precision(given: torch.Tensor, target: torch.dtype, truth: torch.Tensor) -> Iterator[list[str]]:
    out, theirs, batch = torch.empty_like(given, dtype=target), library(), len(given)
    copy = microseconds(lambda: out.copy_(given))
    other = microseconds(lambda: theirs(rows(given), output_dtype=target)) if theirs else math.nan
    for precision in ("fp16", "bf16", "tf32", "fp16x3"):
        calls = {n: float_call(given, target, p, precision) for n, p in programs(64).items()}
        times = {name: microseconds(call) for name, call in calls.items()}
        errors = {name: _error(call(), truth) for name, call in calls.items()}
        run = float_program(64, Precision(precision)).name.removeprefix("block_")
        numbers = [f"{1000 * t / batch:.2f}" for t in (copy, other, *times.values())]
        ratios = [run, f"{other / times[run]:.1f}", f"{times[run] / copy:.2f}"]
        kinds = [f"{_short(given.dtype)} -> {_short(target)}", precision]
        yield [*kinds, *numbers, *ratios, *(f"{e:.1e}" for e in errors.values())]


def _error(result: torch.Tensor, truth: torch.Tensor) -> float:
    return float((result[: len(truth)].double() - truth).norm() / truth.norm())


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def shares(tokens: int = 65536, heads: int = 16, width: int = 128) -> Table:
    """Milliseconds of flash-linear-attention's forward passes, and of the inverse alone."""
    theirs = library()
    if theirs is None:
        return []
    shape = (1, tokens, heads, width)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    beta = torch.rand(shape[:3], device="cuda", dtype=torch.bfloat16)
    g = torch.nn.functional.logsigmoid(torch.randn(shape[:3], device="cuda"))
    A = matrices(tokens * heads // 64, 64).view(-1, heads, 64, 64).transpose(1, 2)  # noqa: N806
    A = A.reshape(1, tokens, heads, 64)  # noqa: N806
    delta = importlib.import_module("fla.ops.delta_rule").chunk_delta_rule
    gated = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    register = importlib.import_module("fla.backends").register
    with torch.no_grad():
        times = {
            "chunk_gated_delta_rule": microseconds(lambda: gated(q, k, v, g, beta)),
            "chunk_delta_rule": microseconds(lambda: delta(q, k, v, beta)),
            "solve_tril, theirs": microseconds(lambda: theirs(A, output_dtype=torch.bfloat16)),
            "solve_tril, ours": microseconds(lambda: solve_tril(A, output_dtype=torch.bfloat16)),
        }
        register(theirs)(solve_tril)
        times["chunk_delta_rule with our solve_tril"] = microseconds(lambda: delta(q, k, v, beta))
    whole = times["chunk_gated_delta_rule"]
    return [[name, f"{t / 1000:.3f}", f"{t / whole:.3f}"] for name, t in times.items()]


def markdown(header: list[str], table: Table) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def size_table(found: dict[tuple[int, int], dict[str, float]]) -> str:
    """Nanoseconds per matrix by contender and size."""
    names = list(dict.fromkeys(name for times in found.values() for name in times))
    lines = [
        [str(chunk), f"{batch:,}", *(f"{times[n]:.2f}" if n in times else "" for n in names)]
        for (chunk, batch), times in found.items()
    ]
    return markdown(["C", "batch", *names], lines)


def plot(found: dict[tuple[int, int], dict[str, float]], card: str, path: Path) -> None:
    """Nanoseconds per matrix over the chunk, at the largest batch of each."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    largest = {chunk: times for (chunk, _), times in sorted(found.items())}
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(n for times in largest.values() for n in times):
        points = [(chunk, times[name]) for chunk, times in largest.items() if name in times]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="C", ylabel="ns per matrix", title=f"float32 to float32, {card}"
    )
    axes.set_xticks(list(largest), [str(c) for c in largest])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/gpu.md"))
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 65536, 1048576])
    arguments = parser.parse_args()
    card = torch.cuda.get_device_name()
    compile_all(arguments.chunks)
    types = ["types", "precision", "copy", "fla", "merge", "elimination", "`solve_tril` runs"]
    types += ["fla / it", "it / copy", "error, merge", "error, elimination"]
    parts = [
        f"Measured on one {card}, torch {torch.__version__}, Triton {triton.__version__}.",
        "64 x 64, 65,536 matrices, nanoseconds per matrix:",
        markdown(types, by_type(65536)),
    ]
    print("\n\n".join(parts), flush=True)
    found = by_size(arguments.chunks, arguments.batches)
    parts += [
        "Forward passes of flash-linear-attention, 65,536 tokens, 16 heads of 128, bfloat16:",
        # This comes last, because it replaces their function by ours.
        markdown(["what", "ms", "share of chunk_gated_delta_rule"], shares()),
    ]
    print(parts[-1], flush=True)
    parts += ["float32 to float32, nanoseconds per matrix:", size_table(found)]
    picture = arguments.page.with_suffix(".png")
    plot(found, card, picture)
    parts.append(f"![nanoseconds per matrix]({picture.name})")
    before, _, rest = arguments.page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    arguments.page.write_text(f"{before}{BEGIN}\n" + "\n\n".join(parts) + f"\n{END}{after}")


if __name__ == "__main__":
    main()
