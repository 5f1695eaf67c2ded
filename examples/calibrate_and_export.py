"""From matrices to a verified int8 graph, in the five calls of the README."""

from __future__ import annotations

import argparse
from pathlib import Path

import qinvert
from qinvert.stress import stress_matrices


def main() -> None:
    """Calibrate on half of the matrices, check on the other half, export, verify."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("inverse.onnx"))
    path: Path = parser.parse_args().output

    matrices = stress_matrices("correlated_keys", count=128, chunk=64)
    plan = qinvert.calibrate(matrices[:64])
    print(plan)
    print(plan.layer().proof())
    print(qinvert.simulate(plan, matrices[64:]))

    qinvert.export(plan, path, profile="npu-qdq-int8", batch=8)
    for result in qinvert.verify(path, plan, matrices[64:]):
        print(result)


if __name__ == "__main__":
    main()
