"""Write docs/accuracy.md: every method under int8 on every stress set, computed anew."""

from __future__ import annotations

import argparse
from pathlib import Path

import qinvert
from qinvert.program import Program
from qinvert.stress import STRESS, stress_matrices

#: Matrices to calibrate on, and as many others to measure on.
COUNT = 64
HEAD = """# Accuracy on the stress set
Written by `docs/tables.py`. int8, one static scale per tensor, C = {chunk}. Calibrated on {count} matrices of
each set, measured on {count} others. Numbers are `sqnr_db`: signal to error of T below the diagonal, against the
float64 inverse of the unquantized L. `floor` is the exact inverse on the grids that `auto` chose, so `auto` minus
`floor` is what the algorithm loses.

"""
TAIL = """
Powers of M carry no bound, so their int8 grids swallow the inverse wherever keys repeat: negative numbers mean
that the result is worse than T = I. Block merge keeps every range under max(beta), and base 4 or less stays close
to the floor everywhere but where rows of T alternate at full strength (`beta_ones`, `half_random`): rounding of the
operands adds up there. One residual correction measures that rounding exactly in the accumulator and takes it off.
`outlier` has one entry 20 times above the rest: the floor itself is low, because one scale must cover both; it
calls for clipped ranges or more bits, not for another algorithm.
"""


def programs(chunk: int) -> list[Program]:
    """Return the fixed programs of the table."""
    return [
        qinvert.neumann(chunk, order=15),
        qinvert.neumann_doubling(chunk),
        qinvert.block_merge(chunk, base=16),
        qinvert.block_merge(chunk, base=4),
        qinvert.block_merge(chunk, base=1),
    ]


def row(name: str, chunk: int) -> list[str]:
    """Return the cells of one stress set."""
    seen, unseen = stress_matrices(name, 2 * COUNT, chunk, seed=1).split(COUNT)
    cells = [f"`{name}`"]
    for method in programs(chunk):
        plan = qinvert.calibrate(seen, method=method)
        cells.append(f"{qinvert.simulate(plan, unseen).layers['layer'].sqnr_db:.1f}")
    report = qinvert.simulate(qinvert.calibrate(seen), unseen).layers["layer"]
    return [*cells, f"**{report.sqnr_db:.1f}**", f"{report.floor_db:.1f}", f"`{report.program}`"]


def table(chunk: int) -> str:
    """Return the Markdown table."""
    titles = [
        f"`{p.name}`<br>{', '.join(f'{k} {v}' for k, v in p.parameters.items())}" for p in programs(chunk)
    ]
    lines = [["set", *titles, "`auto`", "floor", "`auto` chose"], ["---"] * (len(titles) + 4)]
    lines += [row(name, chunk) for name in STRESS]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "accuracy.md")
    arguments = parser.parse_args()
    head = HEAD.format(chunk=arguments.chunk, count=COUNT)
    arguments.output.write_text(head + table(arguments.chunk) + TAIL)


if __name__ == "__main__":
    main()
