"""How what a runtime computed compares with the simulator, and whether that is allowed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from qinvert.errors import VerificationError
from qinvert.export.runtimes import RUNTIMES, Execution
from qinvert.export.verification.references import Reference, Returned
from qinvert.formats import INT8
from qinvert.metrics import ErrorStatistics
from qinvert.numerics.law import Rounding

#: Share of values that may differ by one step of an 8-bit grid where a float MatMul
#: stays unfused.
ALLOWED_SHARE: Final = 1e-4
#: Steps that float32 rounding of a dequantized value may differ by, where the order of
#: its operations is open: OpenVINO adds the identity before it multiplies by the scale.
NOISE: Final = 2**-8
#: Steps of a 16-bit grid by which any value may differ there: accumulators of int16 by
#: int8 are wider than float32, and a step that flips early is multiplied.
WIDE_STEPS: Final = 8
#: Steps of a 16-bit grid for one of an 8-bit grid where a processor has its own rounding:
#: Hexagon cuts 8 bits off the accumulators of int16 by int8, about one step a product.
WIDE_OWN_STEPS: Final = 32
#: Share of values that may exceed the steps of a processor's own rounding: on matrices
#: that amplify, a chain of products turns one step into several.
AMPLIFIED_SHARE: Final = 1e-3
#: How many times those steps the largest of them may reach.
AMPLIFIED_TIMES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How one runtime compares with the simulator."""

    #: Runtime and its setting.
    runtime: str
    #: Values compared.
    values: int
    #: Values that differ: by half a step or more where a processor has its own rounding, by more
    #: than float32 rounding where a runtime reorders floats or not all need be `exact`, else at all.
    mismatches: int
    #: Largest difference, in steps of the output's grid.
    max_steps: float
    #: Values that differ by more than `allowed_steps`.
    beyond: int
    #: Whether profile, scales and runtime promise equality bit for bit, or a processor's
    #: own rounding is known: then no value may differ.
    exact: bool
    #: Whose integers the simulator was asked for.
    rounding: str
    #: Share of values that may differ where they do not.
    allowed_share: float
    #: Steps by which those may differ.
    allowed_steps: int
    #: sqnr of what the runtime returned, against the exact inverse.
    sqnr_db: float
    #: Products by the types that they ran in, as the runtime calls them.
    products: Mapping[str, int]
    #: Nodes that the runtime left to another processor than the one it compiled for.
    elsewhere: tuple[str, ...]

    def __str__(self) -> str:
        equal = f"{self.values - self.mismatches} of {self.values} values equal"
        return f"{self.runtime} == simulator: {equal}"


def compare(
    runtime: str, execution: Execution, actual: Returned, wanted: Reference, exact: bool
) -> Verification:
    """Count the differences of one execution.

    Parameters
    ----------
    runtime : str
    execution : Execution
    actual : array
        What it returned for all matrices.
    wanted : Reference
    exact : bool
        Whether profile and scales promise equality bit for bit.
    """
    own, known = RUNTIMES[runtime].own_steps, wanted.rounding is not Rounding.ONNX
    wide = wanted.plan.output.format.container_bits > INT8.container_bits
    allowed = own * (WIDE_OWN_STEPS if wide else 1) or (WIDE_STEPS if wide else 1)
    allowed = 0 if known else allowed
    steps = _steps(actual, wanted)
    errors = ErrorStatistics()
    errors.update(wanted.inverse(actual).to(wanted.truth.device), wanted.truth)
    exact = known or (exact and not own)
    return Verification(
        runtime=f"{runtime} ({execution.setting})",
        values=actual.size,
        mismatches=int(differs(actual, wanted, _least(runtime, exact)).sum()),
        max_steps=float(steps.max(initial=0.0)),
        beyond=int((~(steps < allowed + 0.5)).sum()),
        exact=exact,
        rounding=str(wanted.rounding),
        allowed_share=0.0 if exact else 1.0 if own or wide else ALLOWED_SHARE,
        allowed_steps=allowed,
        sqnr_db=errors.sqnr_db,
        products=Counter(execution.products.values()),
        elsewhere=tuple(execution.elsewhere),
    )


def judge(runtime: str, result: Verification, actual: Returned, wanted: Reference, hint: str) -> None:
    """Refuse differences that are not allowed; ``runtime`` is what `compare` was told.

    Raises
    ------
    VerificationError
        With the first differing element.
    """
    own = RUNTIMES[runtime].own_steps > 0
    # One legal tie may fall into any sample, however small.
    allowed = 0 if result.exact else max(1.0, result.allowed_share * result.values)
    beyond = AMPLIFIED_SHARE * result.values if own and not result.exact else 0
    largest = result.allowed_steps * (AMPLIFIED_TIMES if own else 1) + 0.5
    if result.mismatches <= allowed and result.beyond <= beyond and result.max_steps < largest:
        return
    expected = wanted.expected
    far = ~(_steps(actual, wanted) < result.allowed_steps + 0.5)
    far = far if own else differs(actual, wanted, _least(runtime, result.exact))
    index = tuple(int(i) for i in np.argwhere(far)[0])
    raise VerificationError(
        f"{result.runtime} differs from the simulator in {result.mismatches} of {result.values} values, "
        f"by up to {result.max_steps:.3g} steps; first at {list(index)}: {actual[index]!r} instead of "
        f"{expected[index]!r}; {hint}"
    )


def differs(actual: Returned, wanted: Reference, least: float) -> npt.NDArray[np.bool_]:
    """Where values differ by ``least`` steps or more, at all if that is 0; NaN differs."""
    return ~(_steps(actual, wanted) < least) if least else ~np.equal(actual, wanted.expected)


def _least(runtime: str, exact: bool) -> float:
    """Steps from which a difference counts."""
    chosen = RUNTIMES[runtime]
    if chosen.own_steps:
        # T of a processor with its own rounding is a float16.
        return 0.5
    return 0.0 if exact and not chosen.reorders else NOISE


def _steps(actual: Returned, wanted: Reference) -> npt.NDArray[np.float64]:
    return np.asarray(np.abs(actual.astype(np.float64) - wanted.expected) / wanted.unit)
