"""How what a runtime computed compares with the simulator, and whether that is allowed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from qinvert.errors import VerificationError
from qinvert.export.runtimes import RUNTIMES, Execution
from qinvert.metrics import ErrorStatistics
from qinvert.plan import LayerPlan

Float32Array: TypeAlias = npt.NDArray[np.float32]

#: Share of values that may differ by one step of an 8-bit grid where a float MatMul
#: stays unfused; the steps of a 16-bit grid are 256 times as many.
ALLOWED_SHARE: Final = 1e-4
#: Steps that float32 rounding of a dequantized value may differ by, where the order of
#: its operations is open: OpenVINO adds the identity before it multiplies by the scale.
NOISE: Final = 2**-8
#: Steps of a 16-bit grid by which a value may differ: one that flips early is multiplied.
WIDE_STEPS: Final = 4
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
    #: Values that differ: at all if `exact`, by more than float32 rounding if not, and by
    #: half a step or more where a processor has its own rounding.
    mismatches: int
    #: Largest difference, in steps of the output's grid.
    max_steps: float
    #: Values that differ by more than `allowed_steps`.
    beyond: int
    #: Whether profile, scales and runtime promise equality bit for bit.
    exact: bool
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """What every runtime is compared with."""

    plan: LayerPlan
    #: What the simulator computes.
    expected: Float32Array
    #: The exact inverse.
    truth: torch.Tensor
    #: One step of the output's grid in every row.
    unit: Float32Array
    #: Whether profile and scales promise equality bit for bit.
    exact: bool

    def compare(self, runtime: str, execution: Execution, actual: Float32Array) -> Verification:
        """Count the differences of one execution."""
        own = RUNTIMES[runtime].own_steps
        extra_bits = self.plan.output.format.container_bits - 8
        allowed = max(own, WIDE_STEPS if extra_bits else 1)
        steps = self.steps(actual)
        errors = ErrorStatistics()
        errors.update(torch.from_numpy(actual).to(self.truth.device), self.truth)
        exact = self.exact and not own
        return Verification(
            runtime=f"{runtime} ({execution.setting})",
            values=actual.size,
            mismatches=int(self.differs(actual, own).sum()),
            max_steps=float(steps.max(initial=0.0)),
            beyond=int((~(steps < allowed + 0.5)).sum()),
            exact=exact,
            allowed_share=1.0 if own else 0.0 if exact else ALLOWED_SHARE * 2**extra_bits,
            allowed_steps=allowed,
            sqnr_db=errors.sqnr_db,
            products=Counter(execution.products.values()),
            elsewhere=tuple(execution.elsewhere),
        )

    def steps(self, actual: Float32Array) -> npt.NDArray[np.float64]:
        """Differences in steps of the output's grid."""
        return np.asarray(np.abs(actual.astype(np.float64) - self.expected) / self.unit)

    def differs(self, actual: Float32Array, own_steps: int) -> npt.NDArray[np.bool_]:
        """Where values differ, NaN included; see `Verification.mismatches`."""
        if self.exact and not own_steps:
            return ~np.equal(actual, self.expected)
        return ~(self.steps(actual) < (0.5 if own_steps else NOISE))

    def judge(self, result: Verification, actual: Float32Array, hint: str) -> None:
        """Refuse differences that are not allowed.

        Raises
        ------
        VerificationError
            With the first differing element.
        """
        own = result.allowed_share == 1
        # One legal tie may fall into any sample, however small.
        allowed = 0 if result.exact else max(1.0, result.allowed_share * result.values)
        beyond = AMPLIFIED_SHARE * result.values if own else 0
        largest = result.allowed_steps * (AMPLIFIED_TIMES if own else 1) + 0.5
        if result.mismatches <= allowed and result.beyond <= beyond and result.max_steps < largest:
            return
        far = ~(self.steps(actual) < result.allowed_steps + 0.5) if own else self.differs(actual, 0)
        index = tuple(int(i) for i in np.argwhere(far)[0])
        raise VerificationError(
            f"{result.runtime} differs from the simulator in {result.mismatches} of {result.values} values, "
            f"by up to {result.max_steps:.3g} steps; first at {list(index)}: {actual[index]!r} instead of "
            f"{self.expected[index]!r}; {hint}"
        )
