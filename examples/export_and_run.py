"""Put an exported inverse into onnxruntime, and see that it computes what the plan says."""

from __future__ import annotations

import argparse
from pathlib import Path

import onnxruntime
import torch

import qinvert
from qinvert.stress import stress_matrices


def main() -> None:
    """Export for int8 products, run eight chunks, compare with the simulator and the exact inverse."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("inverse.onnx"))
    path: Path = parser.parse_args().output

    matrices = stress_matrices("correlated_keys", count=72, chunk=64)
    seen, chunks = matrices[:64], matrices[64:]
    plan = qinvert.calibrate(seen, target="int-ops")
    qinvert.export(plan, path, profile="int-ops", batch=len(chunks))

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for value in (*session.get_inputs(), *session.get_outputs()):
        print(f"{value.name}: {value.type} {value.shape}")
    (inverse,) = session.run(None, {"L": chunks[None].numpy()})

    computed = torch.from_numpy(inverse)[0]
    simulated, exact = plan.layer().inverse(chunks), qinvert.exact_inverse(chunks)
    different = int((computed != simulated).sum())
    print(f"values that differ from the simulator: {different} of {computed.numel()}")
    error, largest = (computed - exact).abs().max(), exact.abs().max()
    print(f"largest error: {float(error):.4f}, largest value: {float(largest):.4f}")


if __name__ == "__main__":
    main()
