"""How what a runtime computed compares with the simulator, and whether that is allowed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from qinvert.errors import VerificationError
from qinvert.export.runtimes import Execution
from qinvert.export.verification.reach import reach
from qinvert.export.verification.references import Reference, Returned
from qinvert.export.verification.tolerance import Steps, Tolerance
from qinvert.metrics import ErrorStatistics
from qinvert.numerics.law import Rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How one runtime compares with the simulator, and by which `Tolerance`.

    Flat, because these are the fields that ``--json`` writes.
    """

    #: Runtime and its setting.
    runtime: str
    #: Values compared.
    values: int
    #: Values that differ, as `Tolerance.counts` says: from half a step on where a processor has its
    #: own rounding, from more than float32 rounding on where floats are reordered or not all values
    #: need be `exact`, and otherwise in any bit.
    mismatches: int
    #: Largest difference, in steps of the output's grid.
    max_steps: float
    #: Values that differ by more than `allowed_steps`, or than float sums can reach, as
    #: `Tolerance.exceeds` says.
    beyond: int
    #: Whether profile, scales and runtime promise equality bit for bit, or a processor's
    #: own rounding is known: then no value may differ.
    exact: bool
    #: Whose integers the simulator was asked for.
    rounding: str
    #: Share of values that may differ where they do not: `Tolerance.share`.
    allowed_share: float
    #: Steps by which those may differ: `Tolerance.steps`, or the largest that float sums can reach
    #: for any of them.
    allowed_steps: int
    #: sqnr of what the runtime returned, against the exact inverse.
    sqnr_db: float
    #: Products by the types that they ran in, as the runtime calls them.
    products: Mapping[str, int]
    #: Nodes that the runtime left to another processor than the one it compiled for.
    elsewhere: tuple[str, ...]
    #: Files of the compiler that were kept, and how to load each.
    kept: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        equal = f"{self.values - self.mismatches} of {self.values} values equal"
        return f"{self.runtime} == simulator: {equal}"


def compare(
    runtime: str, execution: Execution, actual: Returned, wanted: Reference, tolerance: Tolerance
) -> Verification:
    """Count the differences of one execution.

    Parameters
    ----------
    runtime : str
    execution : Execution
    actual : array
        What it returned for all matrices.
    wanted : Reference
    tolerance : Tolerance
        What counts as a difference, and which differences are allowed.
    """
    steps = _steps(actual, wanted)
    reached = _reach(steps, wanted, tolerance)
    label, sqnr_db = f"{runtime} ({execution.setting})", _sqnr_db(actual, wanted)
    return measured(label, execution, steps, reached, tolerance, wanted.rounding, sqnr_db)


def measured(
    label: str,
    execution: Execution,
    steps: Steps,
    reached: Steps | None,
    tolerance: Tolerance,
    rounding: Rounding,
    sqnr_db: float,
) -> Verification:
    """Count differences in steps; ``reached`` is how far each may go where that is `Tolerance.by_reach`."""
    return Verification(
        runtime=label,
        values=steps.size,
        mismatches=int(tolerance.counts(steps).sum()),
        max_steps=float(steps.max(initial=0.0)),
        beyond=int(tolerance.exceeds(steps, reached).sum()),
        exact=tolerance.exact,
        rounding=str(rounding),
        allowed_share=tolerance.share,
        allowed_steps=tolerance.steps if reached is None else int(reached.max(initial=0.0)),
        sqnr_db=sqnr_db,
        products=Counter(execution.products.values()),
        elsewhere=tuple(execution.elsewhere),
        kept=execution.kept,
    )


def judge(result: Verification, actual: Returned, wanted: Reference, tolerance: Tolerance, hint: str) -> None:
    """Refuse differences that are not allowed.

    Parameters
    ----------
    result : Verification
        What `compare` returned for the other arguments.
    actual : array
    wanted : Reference
    tolerance : Tolerance
    hint : str
        The end of the message: what may be the cause, or what to do next.

    Raises
    ------
    VerificationError
        If a difference is not allowed; the message has the first differing element.
    """
    if is_allowed(result, tolerance):
        return
    steps = _steps(actual, wanted)
    blamed = tolerance.blames(steps, _reach(steps, wanted, tolerance))
    raise refusal(result, blamed, actual, wanted.expected, hint)


def is_allowed(result: Verification, tolerance: Tolerance) -> bool:
    """Whether the differences that were counted are allowed."""
    return tolerance.allows(
        values=result.values,
        mismatches=result.mismatches,
        beyond=result.beyond,
        max_steps=result.max_steps,
    )


def refusal(
    result: Verification, blamed: npt.NDArray[np.bool_], actual: Returned, expected: Returned, hint: str
) -> VerificationError:
    """Return the error that names the first value that is blamed."""
    first = np.argwhere(blamed)[0]
    index = tuple(int(i) for i in first)
    return VerificationError(
        f"{result.runtime} differs from the simulator in {result.mismatches} of {result.values} values, "
        f"by up to {result.max_steps:.3g} steps; first at {list(index)}: {actual[index]} instead of "
        f"{expected[index]}; {hint}"
    )


def _steps(actual: Returned, wanted: Reference) -> Steps:
    return np.asarray(np.abs(actual.astype(np.float64) - wanted.expected) / wanted.unit)


def _reach(steps: Steps, wanted: Reference, tolerance: Tolerance) -> Steps | None:
    """What float sums can reach in the matrices that differ, 0 in all others; None if that does not count."""
    if not tolerance.by_reach:
        return None
    rows = np.flatnonzero(tolerance.counts(steps).any(axis=(1, 2)))
    found = np.zeros_like(steps)
    if rows.size:
        systems = wanted.systems[torch.from_numpy(rows).to(wanted.systems.lower.device)]
        found[rows] = reach(wanted.plan, systems, from_keys=wanted.from_keys)
    return found


def _sqnr_db(actual: Returned, wanted: Reference) -> float:
    errors = ErrorStatistics()
    errors.update(wanted.inverse(actual).to(wanted.truth.device), wanted.truth)
    return errors.sqnr_db
