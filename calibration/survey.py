"""Every method under every format on every stress set: what survives quantization?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qinvert.calibration.calibrate import calibrate
from qinvert.calibration.simulate import LayerReport, simulate
from qinvert.methods import METHODS, find_method
from qinvert.methods.block_merge import block_merge
from qinvert.program.program import Program
from qinvert.stress import STRESS, stress_matrices

#: ``bits`` of `qinvert.calibrate` that a survey covers by default.
ALL_BITS: Final = (8, 4, "8x2", 16)
#: Seed of the matrices; half of them calibrate, half are measured.
SEED: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyRow:
    """One method under one format on one stress set."""

    #: Stress set.
    name: str
    #: Title of the program, or ``auto``.
    method: str
    #: Bits, as `qinvert.calibrate` takes them.
    bits: str
    #: Target of the plan.
    target: str
    #: Title of the program that was planned.
    program: str
    #: Formats of the plan.
    formats: str
    #: int8 multiply-accumulates per matrix.
    cost: int
    #: Sqnr that the planner predicts, on the calibration half.
    predicted_sqnr_db: float
    #: Sqnr by simulation, on the calibration half.
    calibrated_sqnr_db: float
    #: Sqnr by simulation, on the other half.
    sqnr_db: float
    #: Sqnr of the exact inverse on the same grids, on the other half.
    floor_db: float
    #: Values of T that are NaN or Inf.
    non_finite: int


def survey_methods(chunk: int) -> list[str | Program]:
    """Return every method with its default arguments, the corrected merge, and ``auto``."""
    programs = [find_method(name)(chunk) for name in METHODS]
    return [*programs, block_merge(chunk, min(16, chunk)), block_merge(chunk, 4, corrections=1), "auto"]


def survey(
    chunk: int = 64,
    count: int = 32,
    bits: Sequence[int | str] = ALL_BITS,
    methods: Sequence[str | Program] | None = None,
    sets: Sequence[str] = tuple(STRESS),
    min_sqnr_db: float = 20.0,
    progress: Callable[[str, int], None] | None = None,
) -> Iterator[SurveyRow]:
    """Yield a row for every stress set, method and format.

    Parameters
    ----------
    chunk : int
        Size C.
    count : int
        Matrices to calibrate on, and as many others to measure on.
    bits : sequence
        Formats, as `qinvert.calibrate` takes them.
    methods : sequence, optional
        Method names or programs; `survey_methods` by default.
    sets : sequence of str
        Names of `qinvert.stress.STRESS`.
    min_sqnr_db : float
        Goal of every plan.
    progress : callable, optional
        Called as ``progress(set, rows)`` after every row.
    """
    rows = 0
    for name in sets:
        matrices = stress_matrices(name, 2 * count, chunk, SEED)
        seen, unseen = matrices[:count], matrices[count:]
        for method in survey_methods(chunk) if methods is None else methods:
            for width in bits:
                plan = calibrate(seen, method=method, bits=width, min_sqnr_db=min_sqnr_db)
                report = simulate(plan, unseen).layers["layer"]
                title = method if isinstance(method, str) else method.title
                facts = plan.layer().provenance
                yield _row(name, title, str(width), plan.target, facts, report)
                rows += 1
                if progress is not None:
                    progress(name, rows)


def _row(
    name: str, method: str, bits: str, target: str, facts: Mapping[str, Any], report: LayerReport
) -> SurveyRow:
    return SurveyRow(
        name=name,
        method=method,
        bits=bits,
        target=target,
        program=report.program,
        formats=report.formats,
        cost=int(facts["cost"]),
        predicted_sqnr_db=facts["predicted_sqnr_db"],
        calibrated_sqnr_db=facts["expected_sqnr_db"],
        sqnr_db=report.sqnr_db,
        floor_db=report.floor_db,
        non_finite=report.non_finite,
    )
