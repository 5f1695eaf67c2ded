"""Write docs/accuracy.md: methods, formats, predictions and heads, computed anew."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qinvert
from qinvert import recall
from qinvert.calibration.heads import head_name
from qinvert.calibration.survey import SurveyRow, survey
from qinvert.documents import markdown
from qinvert.methods import banded_residual
from qinvert.stress import from_keys

#: Matrices of each stress set to calibrate on, and as many others to measure on.
COUNT = 32
#: Above this, an inverse is exact except for the rounding of float32.
EXACT_DB = 100.0
HEAD = """# Accuracy
Written by `make measure` (`docs/tables.py`). C = {chunk}, one static scale for each tensor. Plans are calibrated on {count}
matrices of each set of `qinvert.stress` and measured on {count} others. Numbers are `sqnr_db`: the signal-to-noise ratio
of T below the diagonal, against the float64 inverse of the unquantized L. `exact` means more than 100 dB. `floor` is the
exact inverse on the grids of `auto`: the distance to it is what the algorithm itself loses.
"""
METHODS = """
## int8, every method
{table}
Powers of M have no bound, so their grids become too coarse for the inverse wherever keys repeat: a negative number means
that the result is worse than T = I. Block merge keeps every range below max(beta). With a small base it stays close to
the floor, except where rows of T alternate at full strength (`beta_ones`, `half_random`): there the rounding of the
operands adds up. One residual correction measures that rounding exactly in the accumulator and takes it off.
`outlier` has one entry 20 times above the rest: one scale must cover both, and so the floor itself is low.
`filled_blocks` holds a single constant, 1.45: whether that constant lies on a grid decides the floor.
"""
FORMATS = """
## `auto` by format
{table}
Cost is in int8 multiply-accumulates for one matrix (`qinvert.plan.cost.plan_cost`). An int8x2 product counts as three
int8 products, an int16 product as four. int4 lies in int8 containers and costs what int8 costs. The goal is 60 dB for
plans of 16 bits and 20 dB for the others. `outlier` stays below 60 dB with 16 bits: its largest entry is 20 times the
rest.
"""
PREDICTIONS = """
## What the planner predicts
{table}
The prediction adds up the noise that each grid adds by itself; the simulation runs on the same calibration matrices.
Over all {count} plans of the tables above that are neither exact nor worse than T = I, the prediction is wrong by at most
{worst:.1f} dB ({where}), and by {mean:.1f} dB on average.
"""
HEADS = """
## Grids per head
{table}
`granularity="head"` gives every head its own grids, its own program, and its own graph. The head with the largest values
sets the scales of a shared grid and most of its sqnr; heads with small values gain from grids of their own.
"""
RECALL = """
## The embedded model
{table}
Accuracy is the share of values that the model recalls correctly on 64 unseen sequences. The planner passes over the
banded residual: {reason}.
"""


def decibels(value: float) -> str:
    """Return a cell."""
    return "exact" if value > EXACT_DB else f"{value:.1f}"


def pivot(
    rows: Sequence[SurveyRow], column: Callable[[SurveyRow], str], cell: Callable[[SurveyRow], str]
) -> str:
    """Return a table of sets by ``column``."""
    columns = list(dict.fromkeys(column(row) for row in rows))
    found = {(row.name, column(row)): cell(row) for row in rows}
    names = dict.fromkeys(row.name for row in rows)
    body = [[f"`{name}`", *(found[name, key] for key in columns)] for name in names]
    return markdown([["set", *columns], *body])


def methods_section(rows: Sequence[SurveyRow]) -> str:
    """Return the table of methods under int8."""
    wanted = [row for row in rows if row.bits == "8"]
    table = pivot(wanted, lambda r: f"`{r.method.replace('chunk=64, ', '')}`", lambda r: decibels(r.sqnr_db))
    floors = {row.name: row for row in wanted if row.method == "auto"}
    lines = table.splitlines()
    lines = [f"{lines[0]} floor |", f"{lines[1]} --- |", *lines[2:]]
    lines[2:] = [
        f"{line} {decibels(floors[name].floor_db)} |" for line, name in zip(lines[2:], floors, strict=True)
    ]
    return METHODS.format(table="\n".join(lines) + "\n")


def formats_section(rows: Sequence[SurveyRow]) -> str:
    """Return sqnr, floor and cost of ``auto`` under every format."""

    def cell(row: SurveyRow) -> str:
        return f"{decibels(row.sqnr_db)} of {decibels(row.floor_db)}, {row.cost / 1e6:.1f} M"

    return FORMATS.format(table=pivot(rows, lambda r: f"bits={r.bits}", cell))


def is_telling(row: SurveyRow) -> bool:
    """Whether a prediction says anything: the plan is neither exact nor useless."""
    return 0 < row.calibrated_sqnr_db < EXACT_DB and math.isfinite(row.predicted_sqnr_db)


def predictions_section(rows: Sequence[SurveyRow], auto: Sequence[SurveyRow]) -> str:
    """Return predictions beside simulations."""
    telling = [row for row in (*rows, *auto) if is_telling(row)]
    off = {id(row): abs(row.predicted_sqnr_db - row.calibrated_sqnr_db) for row in telling}
    worst = max(telling, key=lambda row: off[id(row)])
    table = pivot(
        auto,
        lambda r: f"bits={r.bits}",
        lambda r: f"{decibels(r.predicted_sqnr_db)} / {decibels(r.calibrated_sqnr_db)}",
    )
    return PREDICTIONS.format(
        table=table.replace("| set |", "| predicted / simulated |", 1),
        count=len(telling),
        worst=off[id(worst)],
        where=f"`{worst.program}` with bits={worst.bits} on `{worst.name}`",
        mean=sum(off.values()) / len(off),
    )


def gate_matrices(path: Path, rho: float) -> torch.Tensor:
    """Return L ``[heads, chunks, 64, 64]`` from published gates and synthetic unit keys."""
    with np.load(path) as gates:
        beta, g = (torch.from_numpy(gates[name]).T.unflatten(1, (-1, 64)) for name in ("beta", "g"))
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(*beta.shape[:2], 1, 128, generator=generator)
    own = torch.randn(*beta.shape, 128, generator=generator)
    keys = torch.nn.functional.silu(rho**0.5 * shared + (1 - rho) ** 0.5 * own)
    return from_keys(torch.nn.functional.normalize(keys, dim=-1), beta, g)


def heads_section(gates: Path | None) -> str:
    """Return sqnr per tensor and per head on the embedded model and, if given, on gates."""
    model = recall.load_model()
    sources: dict[str, list[tuple[Any, ...]]] = {
        "recall": [(model, recall.sequences(64, seed)) for seed in (0, 1)]
    }
    for path in sorted(gates.glob("*.npz")) if gates else ():
        lower = gate_matrices(path, 0.5)
        half = lower.shape[1] // 2
        sources[f"{path.stem} gates, keys rho 0.5"] = [
            ({"layer": lower[:, :half]},),
            ({"layer": lower[:, half:]},),
        ]
    columns = ["one set of grids", "a set per head", "gain", "its worst head", "the same head", "gain"]
    lines = [["source", "layer", *columns]]
    for name, (seen, unseen) in sources.items():
        whole = qinvert.simulate(qinvert.calibrate(*seen), *unseen)
        plan = qinvert.calibrate(*seen, granularity="head")
        report = qinvert.simulate(plan, *unseen)
        for layer, total in report.totals().items():
            before = whole.layers[layer]
            head = min(range(len(before.head_sqnr_db)), key=before.head_sqnr_db.__getitem__)
            worst, same = before.head_sqnr_db[head], report.layers[head_name(layer, head)].sqnr_db
            pairs = ((before.sqnr_db, total), (worst, same))
            cells = [c for a, b in pairs for c in (decibels(a), decibels(b), f"{b - a:+.1f} dB")]
            lines.append([name, f"`{layer}`", *cells])
    return HEADS.format(table=markdown(lines))


def recall_section() -> str:
    """Return the accuracy of the embedded model under several inverses."""
    model, seen, unseen = recall.load_model(), recall.sequences(64, 0), recall.sequences(64, 1)
    auto = qinvert.calibrate(model, seen)
    inverses = {
        "int8, `auto`": auto,
        "int4, `auto`": qinvert.calibrate(model, seen, bits=4),
        "int8, `block_merge`, base 4": qinvert.calibrate(model, seen, method=qinvert.block_merge(64, 4)),
        "int8, `banded_residual`, N=3 S=8": qinvert.calibrate(model, seen, method=banded_residual(64, 3, 8)),
        "T = I": lambda lower: torch.eye(lower.shape[-1]).expand(lower.shape),
    }
    lines = [["inverse", "accuracy", "KL to exact, nats", "top-1 agreement"]]
    for name, result in qinvert.compare(model, inverses, unseen, score=recall.accuracy).items():
        lines.append([name, f"{result.score:.4f}", f"{result.kl:.2g}", f"{result.top1_agreement:.4f}"])
    reasons = [r for plan in auto.layers.values() for r in plan.provenance["rejected"] if "banded" in r]
    return RECALL.format(table=markdown(lines), reason=reasons[-1].split(": ", 1)[1])


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--gates", type=Path, help="folder of .npz files with beta and g [tokens, heads]")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "accuracy.md")
    arguments = parser.parse_args()
    chunk = arguments.chunk
    rows = list(survey(chunk, COUNT, bits=(8,)))
    auto = list(survey(chunk, COUNT, bits=(4, 8), methods=["auto"]))
    auto += list(survey(chunk, COUNT, bits=("8x2", 16), methods=["auto"], min_sqnr_db=60))
    merges = [qinvert.block_merge(chunk, 4), qinvert.block_merge(chunk, 4, corrections=1)]
    more = list(survey(chunk, COUNT, bits=(4, "8x2", 16), methods=merges))
    sections = [
        HEAD.format(chunk=chunk, count=COUNT),
        methods_section(rows),
        formats_section(auto),
        predictions_section([*rows, *more], auto),
        heads_section(arguments.gates),
        recall_section(),
    ]
    arguments.output.write_text("".join(sections))


if __name__ == "__main__":
    main()
