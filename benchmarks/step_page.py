"""What `step.py` measured, as tables between the markers of a page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from npu_graphs import FLOAT16, Cell, thousands
from step_graphs import (
    COLUMNS,
    GROWING,
    INT8_STEP,
    INVERSES,
    MIXED_STEP,
    OURS,
    SEQUENTIAL,
    WITHOUT,
    Case,
    decibels,
)
from step_layer import Projections

from qinvert.documents import markdown
from qinvert.errors import ExportError

END = "<!-- to here -->"
#: Column of what `decibels` says.
DECIBELS = "o / state, dB"
#: Tensors that parts of a step end with.
SHARES = {
    "gram": ("gram", "scores/decayless"),
    "keys": ("M", "scores", "decay_reads", "decay_writes", "decay_kept"),
}
#: Width of the step that goes with each width of activations.
STEPS = {8: INT8_STEP, 16: MIXED_STEP, 0: FLOAT16}


def marker(script: str) -> str:
    """Return the line of a page behind which a script writes its tables."""
    return f"<!-- benchmarks/{script} writes from here -->"


BEGIN = marker("step.py")


def written(page: str, content: str, begin: str = BEGIN) -> str:
    """Return the page with new tables from one marker to the next end.

    Raises
    ------
    ExportError
        If it has no markers.
    """
    before, found, rest = page.partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ExportError(f"the page has no lines {begin} and {END}; add them where tables belong")
    return f"{before}{begin}\n{content}\n{END}{after}"


def tables(found: Mapping[Case | Projections, Cell]) -> str:
    """Return all tables."""
    results = _Results(found)
    parts = {
        "Against forward substitution": "\n".join(_sentences(results)),
        "Inverses": markdown(list(_inverses(results))),
        "Where the cycles go": markdown(list(_shares(results))),
        "A whole layer": markdown(list(_layers(results))),
        "Sizes": markdown(list(_sizes(results))),
        "Chunks, layouts and ends": markdown(list(_settings(results))),
        "What is refused": _refused(found),
    }
    sources = sorted({cell.source for cell in found.values() if cell.source})
    head = "\n".join(f"* {source}." for source in sources)
    return "\n".join([head, *(f"\n### {title}\n\n{text}" for title, text in parts.items())])


class _Results:
    """Cells by what a table shows."""

    def __init__(self, found: Mapping[Case | Projections, Cell]) -> None:
        self.found = found
        self.chips = [c for c in dict.fromkeys(case.chip for case in found) if c.startswith("hexagon")]

    def cell(self, case: Case | Projections) -> Cell:
        return self.found.get(case, Cell(cycles=None))

    def best(self, case: Case) -> tuple[Case, Cell]:
        """The same graph in the number of chains that costs the least."""
        known = [
            (other, cell)
            for other, cell in self.found.items()
            if isinstance(other, Case) and replace(other, chains=case.chains) == case
        ]
        fallback = (case, Cell(cycles=None))
        return min(known, key=lambda pair: pair[1].cycles or 1e18, default=fallback)

    def text(self, case: Case) -> str:
        best, cell = self.best(case)
        return f"{cell.text} ({best.chains})" if cell.cycles else cell.text


def _sentences(results: _Results) -> Iterator[str]:
    for chip in results.chips:
        for width in (INT8_STEP, MIXED_STEP, FLOAT16):
            ours = results.best(Case(chip=chip, width=width))[1].cycles
            others = {
                name: results.best(Case(chip=chip, inverse=name, width=width))[1].cycles
                for name in SEQUENTIAL
            }
            if ours and all(others.values()):
                ratios = [
                    f"{(cycles or 0) / ours:.1f} ({name.partition(', ')[2]})"
                    for name, cycles in others.items()
                ]
                bits = width if width == FLOAT16 else f"{width} bits"
                yield (
                    f"* `{chip}`, {bits}: {thousands(ours)} cycles; the same step with forward substitution "
                    f"takes {', '.join(ratios)} times as many."
                )


def _inverses(results: _Results) -> Iterator[list[str]]:
    yield ["inverse", "keys / values, bits", DECIBELS, *results.chips]
    for name in INVERSES:
        for width in (INT8_STEP, MIXED_STEP, FLOAT16):
            cells = [results.text(Case(chip=chip, inverse=name, width=width)) for chip in results.chips]
            if any(cells):
                yield [name, width, _decibels(name, width), *cells]


def with_decibels(page: str) -> str:
    """Renew the columns `DECIBELS` of the tables of a page; cycles stay as they were measured."""
    lines, columns = page.split("\n"), list[str]()
    for i, line in enumerate(lines):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells or DECIBELS in cells:
            columns = cells
        elif columns and set(cells[0]) - {"-"}:
            row = dict(zip(columns, cells, strict=True))
            width = row.get("bits") or row["keys / values, bits"]
            row[DECIBELS] = _decibels(row.get("inverse", OURS), width, int(row.get("C", 64)))
            lines[i] = f"| {' | '.join(row.values())} |"
    return "\n".join(lines)


def _decibels(name: str, width: str, chunk: int = 64) -> str:
    if name == WITHOUT:
        return "another rule"
    return " / ".join(f"{value:.1f}" if value > 0 else "< 0" for value in decibels(name, chunk, width))


def _shares(results: _Results) -> Iterator[list[str]]:
    yield ["chip", "bits", "whole step", "M, scores and decays", "of it products of keys", "inverse",
           "everything with values"]  # fmt: skip
    for chip in results.chips:
        for width in (INT8_STEP, MIXED_STEP):
            whole = Case(chip=chip, width=width)
            parts = {name: replace(whole, part=part) for name, part in SHARES.items()}
            # Products of keys do not depend on the width of values.
            parts["gram"] = replace(parts["gram"], width=INT8_STEP)
            numbers = [
                results.cell(case).cycles
                for case in (whole, parts["keys"], parts["gram"], replace(whole, inverse=WITHOUT))
            ]
            if all(numbers):
                total, keys, gram, without = (number or 0 for number in numbers)
                shares = (keys, gram, total - without, without - keys)
                yield [f"`{chip}`", width, thousands(total), *(_share(part, total) for part in shares)]


def _share(part: int, total: int) -> str:
    return f"{thousands(part)} ({part / total:.0%})"


def _layers(results: _Results) -> Iterator[list[str]]:
    yield ["chip", "projections", "step, bits", "mixer", "MLP", "step", "layer", "share of the step",
           "layer with masked columns", "saved", "layer with rows as stored", "saved"]  # fmt: skip
    for chip in results.chips:
        for activations, weights in ((8, 8), (8, 4), (16, 8), (16, 4), (0, 0)):
            parts = [
                results.cell(Projections(chip=chip, part=p, activations=activations, weights=weights)).cycles
                for p in ("mixer", "MLP")
            ]
            width = STEPS[activations]
            steps = [
                results.best(Case(chip=chip, inverse=n, width=width))[1].cycles
                for n in (OURS, COLUMNS, GROWING)
            ]
            if all(parts) and all(steps):
                constant, (ours, *others) = sum(p or 0 for p in parts), [s or 0 for s in steps]
                whole = constant + ours
                cells = [f"`{chip}`", f"A{activations}W{weights}" if weights else FLOAT16, width]
                cells += [thousands(number) for number in (*(p or 0 for p in parts), ours, whole)]
                cells.append(f"{ours / whole:.0%}")
                for other in others:
                    cells += [thousands(constant + other), f"{1 - whole / (constant + other):.0%}"]
                yield cells


def _sizes(results: _Results) -> Iterator[list[str]]:
    yield ["C", "heads", "bits", DECIBELS, *(f"{c}, {what}" for c in results.chips
           for what in ("1 chain", "half", "all apart")), "KiB moved"]  # fmt: skip
    for chunk, heads in ((32, 16), (64, 8), (64, 16), (64, 32), (128, 16)):
        for width in (INT8_STEP, MIXED_STEP):
            each = [
                Case(chip=chip, width=width, chunk=chunk, heads=heads, chains=chains)
                for chip in results.chips
                for chains in (1, heads // 2, heads)
            ]
            moved = results.cell(each[2]).traffic
            cells = [results.cell(case).text for case in each]
            yield [
                str(chunk),
                str(heads),
                width,
                _decibels(OURS, width, chunk),
                *cells,
                f"{moved / 1024:,.0f}",
            ]


def _settings(results: _Results) -> Iterator[list[str]]:
    yield ["graph", "bits", *results.chips]
    changes: dict[str, dict[str, object]] = {
        "channels first, integer ends": {},
        "four chunks in one graph, a chunk": {"chunks": 4},
        "float32 ends": {"integers": False},
        "tokens first": {"layout": "tokens_first"},
        "values first": {"layout": "values_first"},
    }
    for name, change in changes.items():
        for width in (INT8_STEP, MIXED_STEP):
            cells = []
            for chip in results.chips:
                case = replace(Case(chip=chip, width=width), **change)
                cell = results.cell(case)
                per_chunk = cell.cycles is not None and case.chunks > 1
                cells.append(thousands((cell.cycles or 0) / case.chunks) if per_chunk else cell.text)
            yield [name, width, *cells]


def _refused(found: Mapping[Case | Projections, Cell]) -> str:
    graphs: dict[str, list[str]] = {}
    for case, cell in found.items():
        if cell.cycles is None and cell.refused:
            name = case.key.removeprefix("step, ").partition(" C=")[0]
            if isinstance(case, Case):
                changed = {"channels_first": ""}.get(case.layout, f", {case.layout}")
                name = f"{name}, {case.chains} chains{changed}"
            graphs.setdefault(_reason(cell), []).append(f"{case.chip}: {name}")
    lines = [["why", "graphs"], *([why, "; ".join(names)] for why, names in graphs.items())]
    return markdown(lines) if graphs else "Nothing was refused."


def _reason(cell: Cell) -> str:
    if "have no cost" in cell.refused:
        return "operators without a cost"
    text = re.sub("'[^']*'", "a tensor", cell.refused.rpartition(" | ")[2])
    text = text.rpartition(" : ")[2].replace("|", "/").replace("`", "")
    return text[:160]
