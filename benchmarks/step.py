"""What whole chunk steps cost on NPUs, by their compilers: measures, and fills the tables of `docs/step.md`.

    python benchmarks/step.py --cache step.jsonl --write
    python benchmarks/step.py --accuracy

No NPU is needed; see `npu.py`, whose environments, cache and compilers these are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import singledispatch
from pathlib import Path
from typing import TypeAlias

import onnx
from npu import Cache, available, measured
from npu_graphs import FLOAT16
from step_graphs import (
    COLUMNS,
    GROWING,
    INT8_STEP,
    INVERSES,
    MIXED_STEP,
    OURS,
    ROWS,
    SEQUENTIAL,
    WITHOUT,
    Case,
    model_of,
)
from step_layer import PARTS, Projections, projections
from step_page import SHARES, tables, with_decibels, written

PAGE = Path(__file__).resolve().parent.parent / "docs" / "step.md"
CHIPS = ("hexagon-v81", "hexagon-v73", "ethos-u85-256")
WIDTHS = (INT8_STEP, MIXED_STEP)
#: Widths of activations and weights of projections.
PROJECTIONS = ((8, 8), (8, 4), (16, 8), (16, 4), (0, 0))
#: Whatever is compiled.
Compiled: TypeAlias = Case | Projections


@singledispatch
def build(case: Compiled) -> onnx.ModelProto:
    """Build the graph of a case."""
    raise TypeError(type(case))


build.register(Case, model_of)
build.register(Projections, projections)


def cases(chips: Sequence[str]) -> Iterator[Compiled]:
    """Yield every graph of the page, what matters most first."""
    hexagon = [chip for chip in chips if chip.startswith("hexagon")]
    for chip in hexagon:
        yield from (Case(chip=chip, width=width) for width in WIDTHS)
        yield from (Case(chip=chip, inverse=WITHOUT, width=width) for width in WIDTHS)
    for chip in hexagon:
        for width in WIDTHS:
            yield Case(chip=chip, inverse=COLUMNS, width=width, chains=1)
            yield Case(chip=chip, inverse=ROWS, width=width, chains=1)
            yield from (Case(chip=chip, inverse=GROWING, width=width, chains=chains) for chains in (1, 2, 16))
    for chip in hexagon:
        yield from (Case(chip=chip, width=FLOAT16, chains=chains) for chains in (1, 16))
        yield from (Case(chip=chip, inverse=name, width=FLOAT16, chains=1) for name in SEQUENTIAL)
    for chip in hexagon:
        yield from _parts(chip)
    for chip in hexagon:
        for part in PARTS:
            for activations, weights in PROJECTIONS:
                yield Projections(chip=chip, part=part, activations=activations, weights=weights)
    for chip in hexagon:
        yield from _settings(chip)
    for chip in hexagon:
        for chains in (2, 16):
            yield from (Case(chip=chip, inverse=COLUMNS, width=width, chains=chains) for width in WIDTHS)
        others = [name for name in INVERSES if name not in (OURS, WITHOUT, *SEQUENTIAL)]
        for name in others:
            yield from (Case(chip=chip, inverse=name, width=width) for width in WIDTHS)
    for chip in chips:
        if not chip.startswith("hexagon"):
            yield from (Case(chip=chip, inverse=name, chains=1) for name in (OURS, COLUMNS, ROWS))


def _parts(chip: str) -> Iterator[Case]:
    for width in WIDTHS:
        yield from (Case(chip=chip, width=width, part=part) for part in SHARES.values())


def _settings(chip: str) -> Iterator[Case]:
    """Yield one step in other sizes, layouts and ends."""
    for width in WIDTHS:
        whole = Case(chip=chip, width=width)
        yield from (replace(whole, chains=chains) for chains in (1, whole.heads // 2))
        for heads in (8, 32):
            yield from (replace(whole, heads=heads, chains=chains) for chains in (1, heads // 2, heads))
        for chunk in (32, 128):
            yield from (replace(whole, chunk=chunk, chains=chains) for chains in (1, whole.heads))
        yield replace(whole, chunks=4)
        yield from (replace(whole, layout=layout) for layout in ("tokens_first", "values_first"))
        yield replace(whole, integers=False)


def main() -> None:
    """Measure, print the tables, and write them if told to."""
    arguments = parse()
    if arguments.accuracy:
        PAGE.write_text(with_decibels(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    chips = [chip for chip in arguments.hardware if available(chip)]
    if not chips:
        sys.exit("no compiler is installed: there is nothing to measure")
    found = measured(list(cases(chips)), Cache(arguments.cache), arguments.processes, build)
    content = tables(found)
    print(content)
    if arguments.write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), content), encoding="utf-8")


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hardware", nargs="+", default=CHIPS, choices=CHIPS)
    parser.add_argument("--processes", type=int, default=1, help="compilers at a time; 0: what is known")
    parser.add_argument("--cache", type=Path, default=Path("step.jsonl"))
    parser.add_argument("--write", action="store_true", help=f"write the tables of {PAGE.name}")
    parser.add_argument("--accuracy", action="store_true", help="renew what is simulated, and no cycles")
    return parser.parse_args()


if __name__ == "__main__":
    main()
