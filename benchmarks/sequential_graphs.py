"""What the inverse costs on NPUs if it is computed row after row or column after column.

The best of these graphs is what methods of logarithmic depth are compared with,
so each is written as well as could be found: growing and fixed tensors, vectors
and dense products, one chain and several, matrices side by side.  All take M
and return S = T - I, in integers of one grid or in float16.  Methods of
logarithmic depth go through this package's own exports.

Cycles are predicted by the chip's compiler; nothing is measured.  A graph that
holds operators without a cost is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from float_graphs import row_loop
from integer_graph import BATCH, COLUMNS, ELEMENTS, ROWS, IntegerGraph

import qinvert
from qinvert.documents import markdown
from qinvert.errors import ExportError, QInvertError
from qinvert.export.exporting import build, serialize
from qinvert.export.runtimes import estimate, estimators, installed
from qinvert.export.runtimes.subprocesses import how_to_install
from qinvert.matrices import exact_inverse
from qinvert.program.program import Program
from qinvert.stress import stress_matrices

Array: TypeAlias = npt.NDArray[Any]
#: Builds a graph of a number of chains.
Form: TypeAlias = "Callable[[IntegerGraph, int], onnx.ModelProto]"
#: Data on which sqnr is computed: typical keys, and dense matrices whose powers explode.
DATA = ("independent_keys", "half_random")


def growing_rows(graph: IntegerGraph, chains: int) -> onnx.ModelProto:
    """``S[i] = M[i] + M[i, :i] S[:i]``: S grows by a row at a time, at full width."""
    given = graph.chains(graph.given(), chains)
    total = [graph.cut(matrix, rows=(0, 2)) for matrix in given]
    for i in range(2, graph.chunk):
        for k, matrix in enumerate(given):
            row, left = (graph.cut(matrix, rows=(i, i + 1), columns=(0, end)) for end in (graph.chunk, i))
            new = graph.op("Add", graph.op("MatMul", left, total[k]), row)
            total[k] = graph.concat([total[k], new], ROWS)
    return graph.model(graph.concat(total, BATCH))


def fixed_rows(graph: IntegerGraph, chains: int) -> onnx.ModelProto:
    """``S <- S + e_i (M[i] S)`` from ``S = M``: rows below i are zero where M[i] meets them."""
    given = graph.chains(graph.given(), chains)
    total = list(given)
    for i in range(2, graph.chunk):
        place = graph.mask(np.eye(graph.chunk)[:, i : i + 1], graph.batch // chains)
        for k, matrix in enumerate(given):
            product = graph.op("MatMul", graph.cut(matrix, rows=(i, i + 1)), total[k])
            total[k] = graph.op("Add", total[k], graph.op("Mul", place, product))
    return graph.model(graph.concat(total, BATCH))


def vector_columns(graph: IntegerGraph, chains: int) -> onnx.ModelProto:
    """``S <- S + M[:, j] S[j, :]``: slice, slice, Mul and Add for each column."""
    given = graph.chains(graph.given(), chains)
    total = list(given)
    for j in range(1, graph.chunk - 1):
        for k, matrix in enumerate(given):
            column, row = graph.cut(matrix, columns=(j, j + 1)), graph.cut(total[k], rows=(j, j + 1))
            total[k] = graph.op("Add", total[k], graph.op("Mul", column, row))
    return graph.model(graph.concat(total, BATCH))


def shrinking_columns(graph: IntegerGraph, chains: int) -> onnx.ModelProto:
    """The same on the rows below j alone: a finished row leaves, and all are joined once at the end."""
    given = graph.chains(graph.given(), chains)
    done = [[graph.cut(matrix, rows=(0, 1))] for matrix in given]
    rest = [graph.cut(matrix, rows=(1, graph.chunk)) for matrix in given]
    for j in range(1, graph.chunk - 1):
        for k, matrix in enumerate(given):
            row, below = graph.split(rest[k], [1, graph.chunk - 1 - j], ROWS)
            column = graph.cut(matrix, rows=(j + 1, graph.chunk), columns=(j, j + 1))
            rest[k] = graph.op("Add", below, graph.op("Mul", column, row))
            done[k].append(row)
    return graph.model(
        graph.concat([graph.concat([*d, r], ROWS) for d, r in zip(done, rest, strict=True)], BATCH)
    )


def dense_columns(graph: IntegerGraph, chains: int) -> onnx.ModelProto:
    """``S <- S + (mask_j M) S``: one dense product for each column, with a new right operand."""
    given = graph.chains(graph.given(), chains)
    total = list(given)
    for j in range(1, graph.chunk - 1):
        mask = graph.mask(_column(graph.chunk, j), graph.batch // chains)
        for k, matrix in enumerate(given):
            product = graph.op("MatMul", graph.op("Mul", matrix, mask), total[k])
            total[k] = graph.op("Add", total[k], product)
    return graph.model(graph.concat(total, BATCH))


def masked_columns(graph: IntegerGraph, chains: int) -> onnx.ModelProto:
    """``S <- S + mask_j (S M)``, from the last column to the first: M is the right operand of all products.

    It is forward substitution of ``S = M + S M``: column j reads finished columns alone.
    """
    given = graph.chains(graph.given(), chains)
    total = list(given)
    for j in range(graph.chunk - 3, -1, -1):
        mask = graph.mask(_column(graph.chunk, j), graph.batch // chains)
        for k, matrix in enumerate(given):
            product = graph.op("Mul", graph.op("MatMul", total[k], matrix), mask)
            total[k] = graph.op("Add", total[k], product)
    return graph.model(graph.concat(total, BATCH))


def horner(graph: IntegerGraph, chains: int) -> onnx.ModelProto:
    """``S <- M + S M``, C - 2 times: the same without a mask.

    Column j is right after ``C - 1 - j`` products, whatever it held before.  Columns that are not yet
    right hold partial sums of powers: integers saturate, which does no harm; float16 may overflow,
    and infinity times zero is not a number.
    """
    given = graph.chains(graph.given(), chains)
    total = list(given)
    for _ in range(graph.chunk - 2):
        for k, matrix in enumerate(given):
            total[k] = graph.op("Add", graph.op("MatMul", total[k], matrix), matrix)
    return graph.model(graph.concat(total, BATCH))


def side_by_side(graph: IntegerGraph, chains: int, count: int, masked: bool = False) -> onnx.ModelProto:
    """Horner's rule on several matrices at once: ``[S1 S2] <- [M1 M2] + [S1 S2] diag(M1, M2)``.

    There are fewer products, of larger operands, and the right one never changes; most of what is
    multiplied is 0.  With ``masked`` every step finishes one column of each matrix and leaves the
    others alone, as in `masked_columns`.
    """
    apart = graph.chains(graph.given(), count)
    size, chunk = graph.batch // count, graph.chunk
    zeros = graph.zeros(size)
    stripes = [
        graph.concat([matrix if i == k else zeros for k in range(count)], COLUMNS)
        for i, matrix in enumerate(apart)
    ]
    given = graph.parts(graph.concat(apart, COLUMNS), chains, size)
    right = graph.parts(graph.concat(stripes, ROWS), chains, size)
    total = list(given)
    for j in range(chunk - 3, -1, -1):
        mask = graph.mask(np.tile(_column(chunk, j), (1, count)), size // chains) if masked else ""
        for k, wide in enumerate(given):
            product = graph.op("MatMul", total[k], right[k])
            if masked:
                total[k] = graph.op("Add", total[k], graph.op("Mul", product, mask))
            else:
                total[k] = graph.op("Add", product, wide)
    joined = graph.concat(total, BATCH)
    results = [graph.cut(joined, columns=(i * chunk, (i + 1) * chunk)) for i in range(count)]
    return graph.model(graph.concat(results, BATCH))


def _column(chunk: int, j: int) -> Array:
    found: Array = np.tile(np.arange(chunk) == j, (chunk, 1))
    return found


FORMS: dict[str, Form] = {
    "rows, growing": growing_rows,
    "rows, fixed": fixed_rows,
    "vector columns": vector_columns,
    "vector columns, shrinking": shrinking_columns,
    "columns, dense": dense_columns,
    "columns, masked": masked_columns,
    "columns, masked, 4 side by side": partial(side_by_side, count=4, masked=True),
    "Horner's rule": horner,
    "Horner's rule, 2 side by side": partial(side_by_side, count=2),
    "Horner's rule, 4 side by side": partial(side_by_side, count=4),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One graph: what it is, how well it computes, and what it costs on each chip."""

    name: str
    element: str
    chains: int
    sqnr_db: tuple[float, ...]
    cycles: dict[str, str]


def matrices(chunk: int, batch: int) -> dict[str, Array]:
    """L of every data set, float64."""
    return {name: stress_matrices(name, batch, chunk, seed=1).numpy() for name in DATA}


def sqnr_db(found: Array, lower: Array) -> float:
    """``10 log10(|S|^2 / |found - S|^2)`` over the whole batch, S in float64."""
    truth = exact_inverse(torch.from_numpy(lower)).numpy() - np.eye(lower.shape[-1])
    noise = ((found - truth) ** 2).sum()
    return float(10 * np.log10((truth**2).sum() / noise)) if np.isfinite(noise) else float("nan")


def scale_of(lower: Array) -> float:
    """Grid for M and S: the larger one of their maxima is 127 steps."""
    strict = exact_inverse(torch.from_numpy(lower)).numpy() - np.eye(lower.shape[-1])
    return float(max(np.abs(lower).max(), np.abs(strict).max()) / 127)


def executed(model: onnx.ModelProto, given: Array) -> Array:
    """Return what onnxruntime computes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(serialize(model), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"M": given})[0])


def sequential(form: Form, element: str, chains: int, lower: Array) -> tuple[onnx.ModelProto, float]:
    """Build a graph for the grid of the data, and return it with its sqnr."""
    batch, chunk, _ = lower.shape
    scale, zero = scale_of(lower), ELEMENTS[element][1]
    model = form(IntegerGraph(chunk=chunk, batch=batch, element=element, scale=scale), chains)
    if element == "float16":
        return model, sqnr_db(executed(model, -lower[None].astype(np.float16))[0].astype(np.float64), lower)
    given = (np.clip(np.rint(-lower / scale), -127, 127) + zero).astype(element)[None]
    returned = executed(model, given)[0].astype(np.float64)
    return model, sqnr_db((returned - zero) * scale, lower)


def sequential_rows(
    forms: list[str], elements: list[str], counts: list[int], chips: list[str], data: dict[str, Array]
) -> Iterator[Row]:
    """Yield every sequential graph; the grid changes with the data, and the cycles do not."""
    for name in forms:
        for element in elements:
            for chains in counts:
                built = [sequential(FORMS[name], element, chains, lower) for lower in data.values()]
                cycles = costs(serialize(built[0][0]), chips)
                yield Row(
                    name=name,
                    element=element,
                    chains=chains,
                    sqnr_db=tuple(s for _, s in built),
                    cycles=cycles,
                )


def published(chunk: int) -> dict[str, Program]:
    """Return programs of logarithmic depth; the first is the one in Qualcomm's public code."""
    return {
        "banded, order 4, 16 terms": qinvert.banded_residual(chunk, order=4, steps=16),
        "banded": qinvert.banded_residual(chunk),
        "Neumann doubling": qinvert.neumann_doubling(chunk),
        "Newton-Schulz": qinvert.newton_schulz(chunk),
        "merges from 1": qinvert.block_merge(chunk, base=1),
        "elimination": qinvert.elimination(chunk),
    }


def published_rows(profiles: list[str], chips: list[str], data: dict[str, Array]) -> Iterator[Row]:
    """Yield published methods, as this package exports them."""
    for profile in profiles:
        for name, program in published(next(iter(data.values())).shape[-1]).items():
            try:
                plans = [
                    qinvert.calibrate(lower, method=program, target=profile, bits=8)
                    for lower in data.values()
                ]
                model = build(plans[0], batch=len(next(iter(data.values()))), input="M", output="integers")
            except QInvertError as error:
                print(f"{name}, {profile}: {error}", file=sys.stderr)
                continue
            decibels = tuple(
                sqnr_db(np.asarray(plan.layer().inverse(lower)) - np.eye(lower.shape[-1]), lower)
                for plan, lower in zip(plans, data.values(), strict=True)
            )
            cycles = costs(serialize(model), chips)
            yield Row(name=name, element=profile, chains=1, sqnr_db=decibels, cycles=cycles)


def loop_row(chips: list[str], data: dict[str, Array]) -> Row:
    """Return the loop over rows as tracing exports it.

    Hexagon computes its float32 in float16; its sqnr here is that of float32.
    """
    batch, chunk, _ = next(iter(data.values())).shape
    model = row_loop(chunk, batch)
    found = [executed(model, -lower[None].astype(np.float32))[0] - np.eye(chunk) for lower in data.values()]
    decibels = tuple(sqnr_db(s, lower) for s, lower in zip(found, data.values(), strict=True))
    cycles = costs(serialize(model), chips)
    return Row(
        name="row loop of model code", element="float32 as float16", chains=1, sqnr_db=decibels, cycles=cycles
    )


def costs(content: bytes, chips: list[str]) -> dict[str, str]:
    """Cycles of one call by chip, or why there are none."""
    found = {}
    for chip in chips:
        try:
            found[chip] = f"{estimate(content, chip).cycles:,}"
        except ExportError as error:
            text = str(error)
            found[chip] = "no cost for some operators" if "have no cost" in text else "refused"
            print(f"{chip}: {text}", file=sys.stderr)
    return found


def table(rows: list[Row], chips: list[str]) -> str:
    """Return the rows as Markdown."""
    head = ["graph", "type", "chains", *(f"{name}, dB" for name in DATA), *chips]
    lines = [
        [r.name, r.element, str(r.chains), *(f"{v:.1f}" for v in r.sqnr_db), *(r.cycles[c] for c in chips)]
        for r in rows
    ]
    return markdown([head, *lines])


def main() -> None:
    """Print the table, a row as soon as it is known."""
    arguments = parse()
    for chip in arguments.hardware:
        runtime = estimators()[chip]
        if runtime.name not in installed():
            sys.exit(how_to_install(runtime.name, runtime.requirement))
    data = matrices(arguments.chunk, arguments.batch)
    rows: list[Row] = []
    sources: list[Iterator[Row]] = [
        sequential_rows(arguments.forms, arguments.elements, arguments.chains, arguments.hardware, data),
        published_rows(arguments.profiles, arguments.hardware, data),
    ]
    if arguments.loop:
        sources.append(iter([loop_row(arguments.hardware, data)]))
    for source in sources:
        for row in source:
            rows.append(row)
            print(f"{row.name}, {row.element}, {row.chains}: {row.cycles}", file=sys.stderr)
    print(f"C = {arguments.chunk}, {arguments.batch} matrices: simulated cycles of one call, not measured.\n")
    print(table(rows, arguments.hardware))


def parse() -> argparse.Namespace:
    """Return the options."""
    chips = list(estimators())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--hardware", nargs="+", default=["hexagon-v81", "hexagon-v73"], choices=chips)
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--elements", nargs="+", default=list(ELEMENTS), choices=list(ELEMENTS))
    parser.add_argument("--chains", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--profiles", nargs="*", default=["npu-qdq-int8", "npu-qdq-uint8"])
    parser.add_argument(
        "--loop", action="store_true", help="also the loop of model code, which takes minutes"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
