"""What `npu.py` measured, as a page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from npu_choices import Choice, Prediction
from npu_graphs import DATA, MATRICES, SELECTED, Case, Cell, Contender, Family, decibels, finite, thousands
from npu_results import Best, Results

from qinvert.documents import markdown
from qinvert.hardware import HARDWARE

#: Least sqnr on the first data set of what the headline calls computed: that of the products, and of
#: sequential graphs, all of which but a broken one reach more.
GOAL_DB, LEAST_DB = 29.0, 20.0
#: What counts as equal sqnr: another rounding of the same values moves it as far.
SLACK_DB = 0.3
#: Matrices of the headline.
BATCH = 8
#: Characters of a compiler's complaint.
REASON = 120
HEAD = """# Cycles on NPUs
Written by `benchmarks/npu.py --write` on {date}. Every number is what a vendor's compiler predicts for a
graph; nothing ran on a chip. The script makes all graphs, also the baselines
(`benchmarks/sequential_graphs.py`).

{sources}

## What the numbers are
* **Hexagon.** Qualcomm's compiler simulates the program that it made for the chip: its operators in their
  order, and what they move between DDR and on-chip memory. Not in the number are the call of the driver,
  the clock, other programs that use the memory at the same time, and what the host does before and after.
  SA8797 and SA8255 are chips for cars. For phones' chips of the same generations the compiler reports no
  cycles; they have less on-chip memory, so that large batches may cost more there.
* **Ethos-U.** Vela adds up what it expects of every operator and of the memories of one configuration. Arm
  says that these numbers serve the compiler's own decisions: compare them within one configuration only,
  and never with those of Hexagon. Not in the number is what the host does.
* A graph with operators for which the compiler has no cost, or which it leaves to the CPU, is refused. Its
  cell says **no cost**, or **refused** if the compiler takes no such graph. An empty cell was not tried.
* Every graph takes M and returns S = T - I, both in the type that is named. Cells are cycles of one call
  for the whole batch. The number in brackets says into how many independent parts the batch was cut
  (`chains`), where that is cheaper. On Hexagon, 1 and 8 were tried for 8 matrices; 1 and 2, with masks and
  for Horner's scheme also 4 and 8, for sequential graphs. For 64 matrices 8 were tried, for the dense
  eliminations of the table of types also 1 and 64; sequential graphs stay whole, those of several matrices
  side by side also run in 8 parts. Packed merges were left out there: their compilation takes minutes.
* uint8 has the zero point 128 (`hexagon-uint8`). int8 on Hexagon is `npu-qdq-int8`, int16 `hexagon-int16`.
  On Ethos-U int8 is `ethos-int8` and int16 `npu-qdq-int16`.
* **dB** of int16 on Hexagon is that of ONNX's integers; its own cut of 16 by 16 bit products leaves far less
  ([limits.md](limits.md)).
* **dB** is the sqnr of S on {count} matrices of `correlated_keys` and then of `independent_keys`, other
  ones than those of the calibration. It is computed by the simulator, with which onnxruntime agrees
  bit for bit; for sequential graphs by onnxruntime itself. For float16 every result is stored in float16.
  The grids of the compiled graphs come from `correlated_keys`, those of base 16 and of Neumann doubling
  from `independent_keys`: on the others their powers grow beyond every grid.
* **sums**: residual terms join a product by an Add on the grid of the result. **accumulator**: they join
  inside the accumulator of a wider product, or of one whose operand has the identity on its diagonal.
* *Forward substitution* finishes one row or one column by each of C - 2 steps. *Horner's scheme* repeats
  S <- M + S M as many times, on whole matrices. Both are sequential; ratios are given for each.
* `banded, order 3, 8 steps` is the setting of arXiv 2606.06034 for C = 64, and `order 4, C / 4 steps` that
  of Qualcomm's public code, which computes in int16. Neumann doubling is that of arXiv 2605.21325.
"""
HEADLINE = """
The cheapest graph is that of an elimination, a merge or a series with at least {goal:g} dB on
`correlated_keys`. The sequential graphs are the cheapest ones found: of rows and columns, vectors and
dense products, growing and fixed tensors, with masks or without, several matrices side by side, each with
the numbers of chains above. They round less often, as their dB show; the line *of no lower sqnr* compares
with the cheapest graph that loses no more than {slack:g} dB against the best sequential one.
"""
CHOSEN = """
`qinvert.calibrate(lower, hardware=..., batch={batch}, min_sqnr_db=...)` on `correlated_keys`; nothing else
is given. *Predicted* is by the chip's table of costs, *compiled* by its compiler. The last column is the
cheapest graph of this page whose sqnr is no lower, in any type.
"""
REFUSED = """
Graphs that a compiler does not take, apart from those with operators without a cost.
"""
PREDICTED = """
Graphs of programs that are in no fit, with all batches and chains of this page. *Held out* are graphs of
the programs of the fit which it did not use.
"""


def page(
    found: Mapping[Case, Cell], chosen: Sequence[Choice], predicted: Sequence[Prediction], chunk: int = 64
) -> str:
    """Return the whole page."""
    results = Results(found)
    parts = [
        _head(found),
        f"## Against sequential graphs, C = {chunk}, {BATCH} matrices\n{_headline(results, chunk)}",
    ]
    for vendor, name in (("hexagon", "Hexagon"), ("ethos", "Ethos-U")):
        chips = [chip for chip in results.chips if chip.startswith(vendor)]
        if chips:
            parts += _vendor(results, chips, name, chunk)
    parts += [
        f"## What calibrate chooses, C = {chunk}\n{CHOSEN.format(batch=BATCH)}",
        _chosen(results, chosen, chunk),
        f"## Predicted and compiled costs\n{PREDICTED}\n{_predicted(predicted)}",
        f"## What is refused\n{REFUSED}\n{_refused(found)}",
    ]
    return "\n".join(parts)


def _vendor(results: Results, chips: Sequence[str], name: str, chunk: int) -> Iterator[str]:
    element = main_element(chips[0])
    yield f"## {name}: C = {chunk}, {element}\n{_main(results, chips, element, chunk)}"
    sizes = _sizes(results, chips, element, chunk)
    yield f"## {name}: other sizes, {element}, {BATCH} matrices\n{sizes}"
    formats = _formats(results, chips, chunk)
    yield f"## {name}: types, C = {chunk}, {BATCH} matrices\n{formats}"


def _head(found: Mapping[Case, Cell]) -> str:
    sources = {case.chip: cell.source for case, cell in found.items() if cell.source}
    lines = "\n".join(f"* `{chip}`: {source}." for chip, source in sources.items())
    return HEAD.format(
        date=datetime.now(UTC).strftime("%Y-%m-%d"), sources=lines, batch=BATCH, count=MATRICES
    )


def _headline(results: Results, chunk: int) -> str:
    lines = [["chip", "graph", "dB", "cycles", "against", "graph", "dB", "cycles", "times fewer"]]
    sentences = []
    for chip in results.chips:
        known = [best for best in results.all(chip, chunk, BATCH) if best.element == main_element(chip)]
        products = [best for best in known if not best.contender.family.sequential]
        rivals = dict(_rivals([b for b in known if b.contender.family.sequential and b.sqnr_db >= LEAST_DB]))
        best = _cheapest(products, GOAL_DB)
        if best is None or not rivals:
            continue
        name, first = next(iter(rivals.items()))
        lines += [_compared(chip, best, *rival) for rival in rivals.items()]
        equal = _cheapest(products, first.sqnr_db - SLACK_DB)
        if equal is not None:
            lines.append(_compared(chip, equal, f"{name}, of no lower sqnr", first))
        sentences.append(_sentence(chip, best, rivals))
    text = HEADLINE.format(goal=GOAL_DB, slack=SLACK_DB)
    return "\n".join([*sentences, text, markdown(lines)])


def main_element(chip: str) -> str:
    """Type of the main table of a chip."""
    return "int8" if chip.startswith("ethos") else "uint8"


def _cheapest(known: Sequence[Best], least_db: float) -> Best | None:
    return min((b for b in known if b.sqnr_db >= least_db), key=lambda b: b.cycles, default=None)


def _compared(chip: str, best: Best, name: str, rival: Best) -> list[str]:
    ratio = f"{rival.cycles / best.cycles:.1f}"
    each = [[b.title, f"{b.sqnr_db:.1f}", thousands(b.cycles)] for b in (best, rival)]
    return [f"`{chip}`", *each[0], name, *each[1], ratio]


def _rivals(sequential: Sequence[Best]) -> Iterator[tuple[str, Best]]:
    kinds = {
        "best sequential graph": sequential,
        "best forward substitution": [b for b in sequential if b.contender.family == Family.SUBSTITUTION],
        "row after row": [b for b in sequential if b.contender.name.startswith("rows")],
    }
    for name, known in kinds.items():
        best = _cheapest(known, LEAST_DB)
        if best is not None:
            yield name, best


def _sentence(chip: str, best: Best, rivals: Mapping[str, Best]) -> str:
    ratios = [
        f"{rival.cycles / best.cycles:.1f} times fewer than {'the ' if name.startswith('best') else ''}{name}"
        for name, rival in rivals.items()
    ]
    graph = f"{best.contender.family}, {best.title}"
    return f"* `{chip}`: {thousands(best.cycles)} cycles ({graph}), {', '.join(ratios)}."


def _rows(
    results: Results,
    element: str,
    chunk: int,
    settings: Sequence[tuple[str, int, int]],
    contenders: Sequence[Contender],
) -> list[list[str]]:
    """Return a line for every contender: family, name, decibels, and its cells."""
    lines, family = [], ""
    for contender in contenders:
        cells = [results.text(contender, element, chip, size, batch) for chip, size, batch in settings]
        if any(cells):
            values = [finite(decibels(contender, element, chunk, settings[0][0], data)) for data in DATA]
            first = "" if contender.family == family else str(contender.family)
            lines.append([first, contender.name, " / ".join(values), *cells])
            family = contender.family
    return lines


def _main(results: Results, chips: Sequence[str], element: str, chunk: int) -> str:
    settings = [(chip, chunk, batch) for chip in chips for batch in (1, 8, 64)]
    head = ["", "graph", "dB", *(f"{_short(chip)}, {batch}" for chip, _, batch in settings)]
    contenders = results.contenders(chunk=chunk, element=element, chips=chips)
    rows = _rows(results, element, chunk, settings, contenders)
    return f"Columns are the chip and the matrices per call.\n\n{markdown([head, *rows])}"


def _sizes(results: Results, chips: Sequence[str], element: str, chunk: int) -> str:
    tables = []
    for size in (chunk // 2, 2 * chunk):
        settings = [(chip, size, BATCH) for chip in chips]
        head = ["", f"C = {size}", "dB", *(_short(chip) for chip in chips)]
        contenders = results.contenders(chunk=size, element=element, chips=chips)
        tables.append(markdown([head, *_rows(results, element, size, settings, contenders)]))
    return "\n".join(tables)


def _formats(results: Results, chips: Sequence[str], chunk: int) -> str:
    elements = list(dict.fromkeys(case.element for case in results.found if case.chip in chips))
    head = ["", "graph", "type", "dB", *(_short(chip) for chip in chips)]
    lines, before = [head], ("", "")
    contenders = results.contenders(chunk=chunk, element=elements[0], chips=chips)
    for contender in (c for c in contenders if c.name in SELECTED):
        for element in elements:
            settings = [(chip, chunk, BATCH) for chip in chips]
            for _, name, values, *cells in _rows(results, element, chunk, settings, [contender]):
                names = (str(contender.family), name)
                shown = [new if new != old else "" for new, old in zip(names, before, strict=True)]
                lines.append([*shown, element, values, *cells])
                before = names
    return markdown(lines)


def _chosen(results: Results, chosen: Sequence[Choice], chunk: int) -> str:
    head = [
        "chip", "goal, dB", "program", "target", "chains", "dB", "predicted", "compiled", "cheapest known",
    ]  # fmt: skip
    lines = [head]
    for choice in chosen:
        # The same plan computes the same in every graph, so that nothing has to be rounded away.
        known = [b for b in results.all(choice.chip, chunk, BATCH) if b.sqnr_db >= choice.sqnr_db - 0.05]
        best = min(known, key=lambda b: b.cycles, default=None)
        text = "" if best is None else f"{thousands(best.cycles)}: {best.title}, {best.element}"
        names = [f"`{choice.chip}`", f"{choice.goal:g}", f"`{choice.program}`", f"`{choice.target}`"]
        costs = [thousands(choice.predicted), choice.compiled.text, text]
        lines.append([*names, str(choice.chains), f"{choice.sqnr_db:.1f}", *costs])
    return markdown(lines)


def _predicted(predicted: Sequence[Prediction]) -> str:
    head = ["chip", "graphs", "mean error", "median error", "rank correlation", "held out: mean error",
            "held out: rank correlation", "fitted on"]  # fmt: skip
    lines = [head]
    for found in predicted:
        table = HARDWARE[found.chip]
        lines.append(
            [f"`{found.chip}`", str(found.graphs), f"{found.mean_error:.0%}", f"{found.median_error:.0%}",
             f"{found.rank_correlation:.3f}", f"{table.error:.0%}", f"{table.correlation:.3f}", table.date]
        )  # fmt: skip
    return markdown(lines)


def _short(chip: str) -> str:
    return chip.removeprefix("hexagon-").removeprefix("ethos-")


def _refused(found: Mapping[Case, Cell]) -> str:
    """Return a table of the graphs that a compiler does not take; those with one reason share a line."""
    graphs: dict[tuple[str, str], list[Case]] = {}
    for case, cell in found.items():
        if cell.text == "refused":
            name = f"{case.contender.family}, {case.contender.name}"
            graphs.setdefault((name, _reason(cell)), []).append(case)
    if not graphs:
        return "Nothing was refused."
    lines = [["graph", "chips", "types", "C", "matrices", "chains", "why"]]
    for (name, why), cases in graphs.items():
        fields = ("chip", "element", "chunk", "batch", "chains")
        values = [sorted({getattr(case, field) for case in cases}) for field in fields]
        lines.append([name, *(", ".join(map(str, each)) for each in values), why])
    return markdown(lines)


def _reason(cell: Cell) -> str:
    # Behind the types and numbers of the toolkit's errors.
    complaint = cell.refused.partition("refuses the graph")[2].rpartition(" | ")[2]
    text = complaint.rpartition(" : ")[2].removeprefix(": ") or cell.refused
    # Names of tensors differ from graph to graph.
    text = re.sub("'[^']*'", "a tensor", text)
    text = text.replace("|", "/").replace("`", "")
    return text if len(text) <= REASON else f"{text[:REASON]} ..."
