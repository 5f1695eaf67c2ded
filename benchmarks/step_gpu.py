"""Time the simulation of whole chunk steps against the float chunk rule, on a GPU or a CPU, in one run.

Prints milliseconds and ratios; the ratios within one run are what to quote.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn.functional import normalize

import qinvert
from qinvert.calibration.choices import ScaleRule
from qinvert.calibration.chunk_steps.grids import RoomRules, step_grids
from qinvert.calibration.chunk_steps.observation import ChunkObserver
from qinvert.calibration.chunk_steps.widths import width_groups
from qinvert.delta_rule.chunks import DeltaChunks
from qinvert.execution.chunk_steps import run_float, run_integers
from qinvert.formats import INT8, INT16
from qinvert.matrices import SolvedInverse
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Requantize

#: Calls of which the fastest counts.
REPEATS = 5


def chunks_of(batch: int, heads: int, number: int, size: int, channels: int, device: str) -> DeltaChunks:
    """Random chunks of a layer: unit keys, scaled queries, gates like those of models."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, heads, number, size, *shape, generator=generator).to(device)

    return DeltaChunks(
        q=normalize(draw(channels), dim=-1) * channels**-0.5,
        k=normalize(draw(channels), dim=-1),
        v=draw(channels),
        g=-0.1 * draw().abs(),
        beta=torch.sigmoid(draw()),
        state=torch.zeros(batch, heads, channels, channels, device=device),
    )


def plan_of(chunks: DeltaChunks, *, wide: bool) -> LayerPlan:
    """Plan a step for these very chunks, with 8 bits, or 16 for values and state."""
    size, channels = chunks.beta.shape[-1], chunks.k.shape[-1]
    inverse = qinvert.residuals_as_sums(qinvert.elimination(size))
    program = qinvert.gated_delta_step(inverse, channels, channels)
    observer, widths = ChunkObserver(program), width_groups(program)
    observer.update(chunks, sampled=True)
    groups = widths.value_groups if wide else ()
    grids = step_grids(
        program,
        observer.observed(),
        widths,
        widths.formats(INT8, INT16, groups, equal_widths=True),
        channels=None,
        room=RoomRules(),
        scales=ScaleRule.FLOAT,
        requantize=Requantize.MULTIPLIER,
        max_beta=1.0,
    )
    return LayerPlan(program=program, tensors=grids.tensors, requantize=grids.requantize)


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Return the time of the fastest call."""
    found = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - start))
    # The first call compiles and allocates.
    return min(found[1:])


def main() -> None:
    """Time everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=64)
    options = parser.parse_args()
    chunks = chunks_of(
        options.batch, options.heads, options.chunks, options.chunk, options.channels, options.device
    )
    small = chunks_of(1, options.heads, 2, options.chunk, options.channels, options.device)
    plans = {"8 bits": plan_of(small, wide=False), "keys 8, values 16 bits": plan_of(small, wide=True)}
    calls: dict[str, Callable[[], object]] = {
        "float chunk rule": lambda: chunks.apply(SolvedInverse(chunks.lower)),
        "the program in float32": lambda: run_float(plans["8 bits"].program, chunks),
        **{f"integers, {name}": lambda plan=plan: run_integers(plan, chunks) for name, plan in plans.items()},
    }
    times = {name: milliseconds(call, options.device) for name, call in calls.items()}
    print(f"{options.device}, {list(chunks.v.shape)}")
    for name, each in times.items():
        print(f"{name}: {each:.1f} ms, {each / times['float chunk rule']:.2f} times the float chunk rule")
    for name, plan in plans.items():
        on_cpu = DeltaChunks(**{field: getattr(small, field).cpu() for field in small.__slots__})
        one, other = run_integers(plan, small), run_integers(plan, on_cpu)
        same = torch.equal(one.out.cpu(), other.out) and torch.equal(one.state.cpu(), other.state)
        print(f"{name}: the same bits as on the CPU: {same}")


if __name__ == "__main__":
    main()
