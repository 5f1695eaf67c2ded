"""Time inverses of 64 x 64 matrices in one run and print ratios.

The ratio to a copy of the data is what to quote.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from timing import Call, interleaved

import qinvert
from qinvert.execution.floating import run_systems
from qinvert.export.runtimes.onnxruntime_cpu import open_session
from qinvert.simulation import simulate_inverse
from qinvert.stress import stress_matrices
from qinvert.systems import Systems

#: Simulations beside the graph that computes the same integers.
PAIRS = (
    ("simulator int8, base 4", "onnxruntime npu-qdq-int8, base 4"),
    ("simulator int8, tile 16", "onnxruntime int-ops, tile 16"),
)


def graph(plan: qinvert.Plan, profile: str, lower: torch.Tensor) -> Call:
    """Return a call of the exported graph in optimized onnxruntime."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        qinvert.export(plan, path, profile=profile, batch=lower.shape[0])
        session = open_session(path.read_bytes())
    feed = {"L": lower[None].numpy()}
    return lambda: session.run(None, feed)


def contenders(lower: torch.Tensor) -> dict[str, Call]:
    """Return what is compared, by name."""
    chunk = lower.shape[-1]
    merge = qinvert.block_merge(chunk, base=4)
    tiled = qinvert.block_merge(chunk, base=4, tile=min(16, chunk))
    doubling = qinvert.neumann_doubling(chunk)
    plan = qinvert.calibrate(lower, method=merge, bits=8)
    direct = qinvert.calibrate(lower, method=tiled, bits=8, target="int-ops")
    eye = torch.eye(chunk).expand(lower.shape)
    return {
        "copy": lower.clone,
        "torch.linalg.solve_triangular float32": lambda: torch.linalg.solve_triangular(
            lower, eye, upper=False, unitriangular=True
        ),
        "block_merge float32": lambda: run_systems(merge, Systems(lower=lower), torch.float32),
        "neumann_doubling float32": lambda: run_systems(doubling, Systems(lower=lower), torch.float32),
        "simulator int8, base 4": lambda: simulate_inverse(plan.layer(), Systems(lower=lower)),
        "simulator int8, tile 16": lambda: simulate_inverse(direct.layer(), Systems(lower=lower)),
        "onnxruntime npu-qdq-int8, base 4": graph(plan, "npu-qdq-int8", lower),
        "onnxruntime int-ops, tile 16": graph(direct, "int-ops", lower),
    }


def main() -> None:
    """Print microseconds per matrix and the ratio to a copy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    lower = stress_matrices("correlated_keys", arguments.count, arguments.chunk)
    times = interleaved(contenders(lower), arguments.rounds)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    print(f"{arguments.count} matrices, C = {arguments.chunk}, {torch.get_num_threads()} threads")
    for name, value in seconds.items():
        print(f"{name:<40}{1e6 * value / arguments.count:>8.2f} us{value / seconds['copy']:>8.1f} x copy")
    for simulator, graph_name in PAIRS:
        print(f"{simulator} / {graph_name}: {seconds[simulator] / seconds[graph_name]:.2f}")


if __name__ == "__main__":
    main()
