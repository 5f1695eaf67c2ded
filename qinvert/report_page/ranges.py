"""Sections on ranges: how far powers grow, and which values the grids hold."""

from __future__ import annotations

import math

import numpy as np
import torch

from qinvert import plot
from qinvert.calibration.growth import RangeGrowth
from qinvert.execution.inputs import needed, program_inputs
from qinvert.formats import INT8
from qinvert.matrices import solve
from qinvert.plot.values import Histogram, histogram
from qinvert.report_page.evidence import Evidence
from qinvert.report_page.figure import Figure, Section, table
from qinvert.report_page.svg import svg
from qinvert.report_page.words import number
from qinvert.simulation import simulate_inverse
from qinvert.systems import Systems

#: Where measurements on matrices would come from.
NEEDS_MATRICES = "Pass matrices L or a model with data to see this."


def growth_section(found: Evidence) -> Section:
    """How far powers of M outgrow the inverse: the reason for the method."""
    figures = (_growth(found),) if found.growth else ()
    return Section(
        ident="growth",
        title="How far powers outgrow the inverse",
        intro="T = (I - M)^-1 is small, but the powers of M that cheap methods compute may be large. "
        "A grid that "
        "covers a large power has coarse steps, and every factor of two costs one bit. Programs that "
        "never form "
        "large powers keep all bits.",
        figures=figures,
        lacks=() if figures else (NEEDS_MATRICES,),
    )


def _growth(found: Evidence) -> Figure:
    powers = sorted({k for g in found.growth.values() for k in g.powers})
    worst = max(found.growth, key=lambda name: found.growth[name].growth)
    says = _growth_words(worst, found.growth[worst])
    rows = [
        [name, number(g.matrices), *(number(g.powers[k]) if k in g.powers else "-" for k in powers),
         number(g.inverse), f"{number(g.growth)} times"]
        for name, g in found.growth.items()
    ]  # fmt: skip
    columns = ["layer", "matrices", *(f"max|M^{k}|" for k in powers), "max|T - I|", "growth"]
    return Figure(
        ident="growth-figure",
        title="Powers of M against the inverse",
        says=f"{says} Above the dashed line one step of int8 is larger than the inverse itself.",
        alternative=f"Largest magnitude of each power of M over that of the inverse, by layer. {says}",
        svg=svg(plot.range_growth(found.growth), "growth", says),
        table=table("Largest magnitudes by layer", columns, rows),
        wide=True,
    )


def _growth_words(name: str, growth: RangeGrowth) -> str:
    if growth.growth <= 1:
        return "No power of M is larger than M and the inverse, so that every method is safe here."
    bits = f"{math.log2(growth.growth):.1f}" if math.isfinite(growth.growth) else "all"
    beyond = ", more than int8 has" if growth.growth > INT8.largest else ""
    return f"{name} grows the most, {number(growth.growth)} times, which takes {bits} bits{beyond}."


def values_section(found: Evidence) -> Section:
    """Which values the grids of M and T hold, and where the errors are."""
    figures = tuple(
        figure
        for place, name in enumerate(found.detailed)
        if name in found.systems and found.plan.layers[name].program.is_inverse
        for figure in _values(found, place, name)
    )
    lacks = [] if found.systems else [NEEDS_MATRICES]
    if found.of_steps:
        lacks = [
            "Histograms are drawn of plans of inverses; the program below has the ranges of a chunk step."
        ]
    return Section(
        ident="values",
        title="Values and their grids",
        intro="How the values below the diagonal lie on the grids of M and T, and where in the chunk "
        "the errors "
        f"of T are, on up to {_most(found)} matrices of each entry.",
        figures=figures,
        lacks=tuple(lacks),
    )


def _most(found: Evidence) -> int:
    return max((systems.count for systems in found.systems.values()), default=0)


def _values(found: Evidence, place: int, name: str) -> list[Figure]:
    layer, systems = found.plan.layers[name], found.systems[name]
    given = needed(layer.program, systems)
    exact = solve(given.lower)
    ports = layer.program.inverse_ports
    matrix = program_inputs(layer.program, given, torch.float32)[ports.matrix]
    source = _below(matrix)
    # T of a factored program is stored as W, whose grid is not that of T.
    result = [] if ports.factored else [("T - I", _below(exact), layer.output)]
    shown = [("K = M / beta" if ports.factored else "M", source, layer.input), *result]
    figures = [
        _histogram(histogram(values, grid), what, name, f"values-{place}-{i}")
        for i, (what, values, grid) in enumerate(shown)
    ]
    errors = (simulate_inverse(layer, given).to(torch.float64) - exact).square().mean(0).sqrt()
    return [*figures, _error_map(errors.cpu().numpy(), name, f"errors-{place}", given)]


def _below(matrices: torch.Tensor) -> np.ndarray:
    size = matrices.shape[-1]
    rows, columns = torch.tril_indices(size, size, -1, device=matrices.device)
    return matrices.reshape(-1, size, size)[:, rows, columns].cpu().numpy()


def _histogram(found: Histogram, what: str, name: str, ident: str) -> Figure:
    share = found.vanished / max(1, found.values)
    says = (
        f"{found.clipped:,} of {found.values:,} values are clipped, {found.saturated:,} lie on an end of the "
        f"grid, and {share:.0%} are too small for its step and become 0."
    )
    middles = zip(found.edges, found.edges[1:], found.counts, strict=False)
    rows = [[f"{low:.3g} to {high:.3g}", f"{count:,}"] for low, high, count in middles if count]
    return Figure(
        ident=ident,
        title=f"{what} of {name}",
        says=says,
        alternative=f"Histogram of {what} with the ends of its grid. {says}",
        svg=svg(plot.value_histogram(found, what), ident, f"Histogram of {what} of {name}. {says}"),
        table=table(f"Values of {what} of {name} by size", ["from, to", "values"], rows),
    )


def _error_map(errors: np.ndarray, name: str, ident: str, systems: Systems) -> Figure:
    below = np.tril(errors, -1)
    row, column = np.unravel_index(int(below.argmax()), below.shape)
    says = (
        f"The largest root mean square error over {systems.count} matrices is {below.max():.3g}, in "
        f"row {row} and "
        f"column {column}."
    )
    size, blocks = len(below), min(8, len(below))
    step = size // blocks
    coarse = np.sqrt((below**2).reshape(blocks, step, blocks, step).mean((1, 3)))
    rows = [
        [f"rows {i * step} to {(i + 1) * step - 1}", *(f"{v:.2g}" if v else "-" for v in line)]
        for i, line in enumerate(coarse)
    ]
    columns = ["", *(f"{i * step} to {(i + 1) * step - 1}" for i in range(blocks))]
    return Figure(
        ident=ident,
        title=f"Errors of T of {name}",
        says=says,
        alternative=f"Map of the errors of T by row and column of the chunk. {says}",
        svg=svg(plot.error_map(errors), ident, f"Map of the errors of T of {name}. {says}"),
        table=table(f"Root mean square error of {name} by blocks of rows and columns", columns, rows),
    )
