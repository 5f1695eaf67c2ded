"""What calibration costs: time against the model's own forward pass, and memory against more data."""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from timing import interleaved

import qinvert
from qinvert import recall
from qinvert.calibration.data.token_batches import token_batches
from qinvert.calibration.patching import run_model

#: Sequences of one generated batch in the memory measurement.
BATCH = 16


def seconds(sequences: int, rounds: int) -> dict[str, float]:
    """Return the median seconds of a forward pass over the data and of a calibration on it."""
    model, tokens = recall.load_model(), recall.sequences(sequences)

    def forward() -> None:
        for batch in token_batches(tokens):
            run_model(model, batch)

    calls: dict[str, Any] = {"forward": forward, "calibrate": lambda: qinvert.calibrate(model, tokens)}
    times = interleaved(calls, rounds, pause=0)
    ratios = [c / f for f, c in zip(times["forward"], times["calibrate"], strict=True)]
    return {name: statistics.median(t) for name, t in times.items()} | {"ratio": statistics.median(ratios)}


def stream(batches: int) -> Iterator[torch.Tensor]:
    """Yield batches of token ids, made one at a time."""
    for seed in range(batches):
        yield recall.sequences(BATCH, seed)


def peak_after(batches: int) -> int:
    """Calibrate on a stream in a fresh process and return its peak resident memory, KiB."""
    command = [sys.executable, __file__, "--peak", str(batches)]
    # Freed memory is returned at once, because what the allocator would keep varies by 10 %.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "100000"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout)


def main() -> None:
    """Print both measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak is not None:
        qinvert.calibrate(recall.load_model(), stream(arguments.peak))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    measured = seconds(arguments.sequences, arguments.rounds)
    print(f"{arguments.sequences} sequences of 512 tokens, {torch.get_num_threads()} threads")
    print(f"forward {measured['forward']:.2f} s, calibrate {measured['calibrate']:.2f} s", end=", ")
    print(f"median ratio {measured['ratio']:.2f}")
    small, large = peak_after(4), peak_after(40)
    print(f"peak memory: {small / 1024:.0f} MiB on 64 sequences, {large / 1024:.0f} MiB on 640", end=", ")
    print(f"ratio {large / small:.3f}")


if __name__ == "__main__":
    main()
