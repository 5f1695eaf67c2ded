"""Which MatMul-only inverse survives int8?  Every method on every stress set, with its floor."""

from __future__ import annotations

import argparse

import qinvert
from qinvert.program.program import Program
from qinvert.stress import STRESS, stress_matrices


def programs(chunk: int) -> list[Program]:
    """Return the methods to compare."""
    return [
        qinvert.neumann(chunk, order=min(15, chunk - 1)),
        qinvert.neumann_doubling(chunk),
        qinvert.block_merge(chunk, base=16),
        qinvert.block_merge(chunk, base=4),
        qinvert.block_merge(chunk, base=1),
        qinvert.block_merge(chunk, base=4, corrections=1),
    ]


def main() -> None:
    """Print sqnr in dB, below the diagonal, for int8 with one static scale per tensor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=64)
    arguments = parser.parse_args()

    candidates = programs(arguments.chunk)
    for number, program in enumerate(candidates, start=1):
        print(f"{number}: {program.title}")
    print(f"{'sqnr_db':<22}{''.join(f'{n:>9}' for n in range(1, len(candidates) + 1))}{'floor':>9}")
    for name in STRESS:
        matrices = stress_matrices(name, arguments.count, arguments.chunk)
        reports = []
        for program in candidates:
            plan = qinvert.calibrate(matrices, method=program)
            reports.append(qinvert.simulate(plan, matrices).layers["layer"])
        cells = "".join(f"{report.sqnr_db:>9.1f}" for report in reports)
        print(f"{name:<22}{cells}{reports[-1].floor_db:>9.1f}")


if __name__ == "__main__":
    main()
