"""What `npu.py` compiles, by name: methods of logarithmic depth and sequential baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, partial
from typing import TypeAlias

import numpy as np
import onnx
import torch
from float_graphs import half_graph
from integer_graph import IntegerGraph
from sequential_graphs import FORMS, scale_of, sequential, sqnr_db

import qinvert
from qinvert.errors import ExportError, QInvertError
from qinvert.execution.floating import run
from qinvert.export.exporting import build
from qinvert.plan.plan import Plan
from qinvert.program.program import Program
from qinvert.program.residual_sums import residuals_as_sums
from qinvert.stress import stress_matrices

#: Returns the program for matrices of one size.
Builder: TypeAlias = Callable[[int], Program]
#: Data on which sqnr is computed.
DATA = ("correlated_keys", "independent_keys")
#: Where the grids of the graphs that are compiled come from: the first, or the second for methods whose
#: powers grow beyond all grids on the first.
GROWING = ("base 16", "Neumann doubling")
#: Matrices that a plan is calibrated on, and other ones on which its sqnr is computed.
MATRICES = 32
#: Export profile of a number format, for each vendor.
PROFILES = {
    "hexagon": {"uint8": "hexagon-uint8", "int8": "npu-qdq-int8", "int16": "hexagon-int16"},
    "ethos": {"int8": "ethos-int8", "int16": "npu-qdq-int16"},
}
FLOAT16 = "float16"


class Family(StrEnum):
    """What contenders are compared as."""

    #: `qinvert.elimination`.
    ELIMINATION = "elimination"
    #: `qinvert.block_merge`.
    MERGES = "block merges"
    #: Other programs of logarithmic depth.
    PUBLISHED = "published series"
    #: One row or one column is finished by each step.
    SUBSTITUTION = "forward substitution"
    #: As many steps, each on the whole matrix.
    HORNER = "Horner's scheme"

    @property
    def sequential(self) -> bool:
        """Whether about C steps wait for each other."""
        return self in (Family.SUBSTITUTION, Family.HORNER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to compute the inverse, for any size."""

    name: str
    family: Family
    #: None for a form of `sequential_graphs`, whose name is that of the contender.
    program: Builder | None = None

    @property
    def grids(self) -> str:
        """Data from which the grids of compiled graphs come."""
        return DATA[self.name.startswith(GROWING)]

    def fits(self, chunk: int, batch: int, chains: int) -> bool:
        """Whether there is such a graph: some merge larger blocks, or take several matrices at a time."""
        if self.program is not None:
            try:
                self.program(chunk)
            except QInvertError:
                return False
            return batch % chains == 0
        together = int(self.name.split()[-4]) if "side by side" in self.name else 1
        return batch % (together * chains) == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One graph for one chip."""

    contender: Contender
    #: A key of `PROFILES`, or float16.
    element: str
    chunk: int
    batch: int
    chains: int
    chip: str

    @property
    def key(self) -> str:
        """Name for people who read the cache."""
        sizes = f"C={self.chunk} batch={self.batch} chains={self.chains}"
        return f"{self.contender.family}, {self.contender.name}: {self.element} {sizes}"

    @property
    def profile(self) -> str:
        """Export profile of the chip's vendor."""
        return PROFILES[self.chip.partition("-")[0]][self.element]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What a compiler says of one graph."""

    #: None where the graph is refused, or was not compiled.
    cycles: int | None
    #: Why it is refused.
    refused: str = ""
    #: Who predicted.
    source: str = ""
    #: Bytes between the chip and its memory; 0 if they are not known.
    traffic: int = 0

    @property
    def text(self) -> str:
        """The same for a table."""
        if self.cycles is not None:
            return thousands(self.cycles)
        if not self.refused:
            return ""
        return "no cost" if "have no cost" in self.refused else "refused"


def thousands(cycles: float) -> str:
    """Cycles for a table: three digits are more than a prediction is worth."""
    return f"{cycles / 1000:.1f}k" if cycles < 1e5 else f"{cycles / 1000:,.0f}k"


def _both(name: str, family: Family, program: Builder) -> Iterator[Contender]:
    """Yield both ways to add residual terms."""
    yield Contender(
        name=f"{name}, sums", family=family, program=lambda chunk: residuals_as_sums(program(chunk))
    )
    yield Contender(name=f"{name}, accumulator", family=family, program=program)


def _tiled(method: Builder, tile: int, **arguments: int | str) -> Builder:
    def tiled(chunk: int) -> Program:
        if chunk <= tile:
            raise ExportError(f"{chunk} tokens are one tile of {tile}")
        return method(chunk, tile=tile, **arguments)  # type: ignore[call-arg]

    return tiled


def _contenders() -> Iterator[Contender]:
    eliminate, merge = qinvert.elimination, qinvert.block_merge
    forms = {
        "left": eliminate,
        "right": partial(eliminate, side="right"),
        "restart at level 4": partial(eliminate, restart=4),
        "one correction": partial(eliminate, corrections=1),
        "packed tiles of 16": _tiled(eliminate, 16),
        "packed tiles of 32": _tiled(eliminate, 32),
    }
    for name, program in forms.items():
        yield from _both(name, Family.ELIMINATION, program)
    # In the accumulator radix 4 needs wider products, and right tiles cost what left ones do.
    right = {
        "right, radix 4": partial(eliminate, side="right", radix=4),
        "right, packed tiles of 16": _tiled(eliminate, 16, side="right"),
        "right, packed tiles of 4": _tiled(eliminate, 4, side="right"),
    }
    for name, program in right.items():
        yield next(_both(name, Family.ELIMINATION, program))
    # Only in the accumulator a correction sees what rounding left.
    corrected = {
        Family.ELIMINATION: ("packed tiles of 16", _tiled(eliminate, 16, corrections=1)),
        Family.MERGES: ("base 1 or 2, packed", partial(merge, base=2, layout="packed", corrections=1)),
    }
    for family, (name, program) in corrected.items():
        yield Contender(name=f"{name}, corrected, accumulator", family=family, program=program)
    # A block of two rows is its own inverse: both bases give the same graph.
    bases = {"base 1 or 2": 2, "base 4": 4, "base 16": 16}
    for layout in ("masked", "packed"):
        for name, base in bases.items():
            yield from _both(f"{name}, {layout}", Family.MERGES, partial(merge, base=base, layout=layout))
    yield from _both("base 1 or 2, tiles of 16", Family.MERGES, _tiled(merge, 16, base=2))
    banded = qinvert.banded_residual
    published: dict[str, Builder] = {
        "banded, order 3, 8 steps": partial(banded, order=3, steps=8),
        "banded, order 4, C / 4 steps": lambda chunk: banded(chunk, order=4, steps=chunk // 4),
    }
    for name, builder in published.items():
        yield from _both(name, Family.PUBLISHED, builder)
    series = {"Neumann doubling": qinvert.neumann_doubling, "Newton-Schulz": qinvert.newton_schulz}
    for name, builder in series.items():
        yield Contender(name=name, family=Family.PUBLISHED, program=builder)
    for name in FORMS:
        family = Family.HORNER if name.startswith("Horner") else Family.SUBSTITUTION
        yield Contender(name=name, family=family)


CONTENDERS = tuple(_contenders())

#: Names of those that are also compared in other sizes and number formats.
SELECTED = (
    "left, sums",
    "left, accumulator",
    "right, sums",
    "restart at level 4, sums",
    "right, radix 4, sums",
    "packed tiles of 16, sums",
    "right, packed tiles of 16, sums",
    "base 1 or 2, masked, sums",
    "base 1 or 2, tiles of 16, sums",
    "base 1 or 2, tiles of 16, accumulator",
    "base 4, packed, accumulator",
    "banded, order 3, 8 steps, accumulator",
    "banded, order 4, C / 4 steps, accumulator",
    "Neumann doubling",
    "Newton-Schulz",
    "rows, growing",
    "vector columns, shrinking",
    "columns, masked, 4 side by side",
    "Horner's rule",
    "Horner's rule, 4 side by side",
)


@cache
def matrices(data: str, chunk: int, seed: int) -> torch.Tensor:
    """Return L of one data set."""
    return stress_matrices(data, MATRICES, chunk, seed=seed)


@cache
def plan_of(contender: Contender, chunk: int, profile: str, data: str) -> Plan:
    """Return a plan in one number format, whatever sqnr it has."""
    assert contender.program is not None
    bits = 16 if "int16" in profile else 8
    goals = {"min_sqnr_db": 0.0, "max_loss_db": 1000.0}
    lower = matrices(data, chunk, seed=0)
    return qinvert.calibrate(lower, method=contender.program(chunk), target=profile, bits=bits, **goals)


def model_of(case: Case) -> onnx.ModelProto:
    """Build the graph of a case: M to S = T - I, both of the case's type.

    Raises
    ------
    QInvertError
        If the target cannot express it.
    """
    contender, sizes = case.contender, {"batch": case.batch, "chains": case.chains}
    if contender.program is None:
        scale = scale_of(matrices(DATA[0], case.chunk, seed=1).numpy())
        graph = IntegerGraph(chunk=case.chunk, batch=case.batch, element=case.element, scale=scale)
        return FORMS[contender.name](graph, case.chains)
    if case.element == FLOAT16:
        return half_graph(contender.program(case.chunk), **sizes)
    plan = plan_of(contender, case.chunk, case.profile, contender.grids)
    return build(plan, input="M", input_type="integers", output="integers", **sizes)


def decibels(contender: Contender, element: str, chunk: int, chip: str, data: str) -> float:
    """Sqnr of S by the simulator, for sequential graphs by onnxruntime; not a number where it overflows."""
    case = Case(contender=contender, element=element, chunk=chunk, batch=1, chains=1, chip=chip)
    profile = case.profile if element != FLOAT16 else FLOAT16
    return _decibels(contender, element, chunk, profile, data)


@cache
def _decibels(contender: Contender, element: str, chunk: int, profile: str, data: str) -> float:
    lower = matrices(data, chunk, seed=1)
    if contender.program is None:
        return sequential(FORMS[contender.name], element, 1, lower.numpy())[1]
    if profile == FLOAT16:
        found = run(contender.program(chunk), lower, torch.float16).double()
    else:
        found = torch.as_tensor(plan_of(contender, chunk, profile, data).layer().inverse(lower)).double()
    return sqnr_db((found - torch.eye(chunk)).numpy(), lower.numpy())


def finite(value: float) -> str:
    """Decibels for a table."""
    if not np.isfinite(value):
        return "overflow"
    return f"{value:.1f}" if value >= 0 else "< 0"
