"""By how much a runtime may differ from the simulator, who allows it, and why.

There are four kinds of tolerance, each with a constructor of its own:

=====================================  ===========================================================
`Tolerance.of_known_rounding`          a processor whose rounding the simulator follows: no value
`Tolerance.of_own_rounding`            a processor whose rounding is not known: any value, a little
`Tolerance.of_equality`                profile and scales promise equality: no value
`Tolerance.of_float_products`          products that may stay in float32: what their sums can reach
=====================================  ===========================================================

`tolerance_for` is the one place that chooses between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from qinvert.checks import check_integer
from qinvert.errors import ExportError
from qinvert.export.runtimes import Runtime
from qinvert.numerics.exponentials import near_ties
from qinvert.numerics.law import Rounding
from qinvert.numerics.scales import is_power_of_two
from qinvert.plan.plan import LayerPlan
from qinvert.profiles import Profile
from qinvert.program.steps import Exponential

#: Steps below which two values still mean the same integer.
HALF_STEP: Final = 0.5
#: Steps that float32 rounding of a dequantized value may differ by, where the order of
#: its operations is open: OpenVINO adds the identity before it multiplies by the scale.
NOISE: Final = 2**-8
#: Share of values that may differ where a float MatMul stays unfused, each by what `reach` proves
#: possible for it.  Ties are rare, but a program that amplifies spreads one over a matrix; where it
#: spreads many, a comparison could not tell another program.
FLOAT_PRODUCT_SHARE: Final = 1 / 16
#: Steps of a 16-bit grid for one of an 8-bit grid where a processor has its own rounding:
#: Hexagon cuts 8 bits off the accumulators of int16 by int8, about one step per product.
WIDE_OWN_STEPS: Final = 32
#: Share of values that may exceed the steps of a processor's own rounding: on matrices
#: that amplify, a chain of products turns one step into several.
AMPLIFIED_SHARE: Final = 1e-3
#: How many times those steps the largest of them may reach.
AMPLIFIED_TIMES: Final = 4
#: Most steps between two values of the widest grid, of 16 bits.
MAX_STEPS: Final = 2**16 - 1
#: Largest error, relative to the largest element, of an L that a graph builds from keys, by
#: the type in which the processor runs float operators: rounding stays far below it.
KEYS_TOLERANCE: Final = {"float32": 1e-4, "float16": 2e-3}

#: Differences from the simulator, in steps of the output's grid.
Steps: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Which differences from the simulator are allowed, in steps of the output's grid.

    Invariants: values that exceed `steps` are among those that differ, so
    `share_beyond` is at most `share`; and `times_beyond` is more than 1
    exactly where some values may exceed `steps`.

    Raises
    ------
    ExportError
        At construction, if a number is not in its range.
    """

    #: Steps from which a difference counts, at most half a step; 0 counts every bit.
    #: The runtime allows more than 0.  A processor with its own rounding returns T as a float16,
    #: so that only half a step tells two integers apart; one that reorders float operators
    #: behind the integers, or a product that may run in float32, is given `NOISE`.
    counted_from: float
    #: Share of the values that may differ, from 0 to 1.
    #: The profile allows it.  The standard leaves the order of float sums in a QDQ graph open, so
    #: that rare values close to a rounding boundary fall on its other side; on a processor with its
    #: own rounding, that may happen to any value.
    share: float = 0.0
    #: Steps by which the values that may differ may do so; half a step is added for float noise.
    #: The runtime sets them where a processor has its own rounding, and more on a 16-bit grid, where
    #: one step is 256 times smaller.
    steps: int = 0
    #: Share of the values that may differ by more than `steps`, from 0 to 1.
    #: The processor allows it, if it has its own rounding: matrices that amplify turn a single
    #: step early in a chain of products into several at its end.
    share_beyond: float = 0.0
    #: How many times `steps` the largest of those may reach.
    #: The processor allows it, as above; without a bound a wrong product could hide there.
    times_beyond: int = 1
    #: Whether a value may differ by what float32 sums can reach for it, see
    #: `qinvert.export.verification.reach`, in place of `steps`.
    by_reach: bool = False

    def __post_init__(self) -> None:
        _check_fraction("counted_from", self.counted_from, HALF_STEP)
        _check_fraction("share", self.share, 1.0)
        check_integer("steps", self.steps, 0, MAX_STEPS, ExportError)
        _check_fraction("share_beyond", self.share_beyond, self.share)
        check_integer("times_beyond", self.times_beyond, 1, MAX_STEPS, ExportError)
        if (self.share_beyond > 0) != (self.times_beyond > 1):
            raise ExportError(
                f"share_beyond {self.share_beyond!r} and times_beyond {self.times_beyond!r} do not fit; "
                "pass 0 and 1, or more than both"
            )

    @staticmethod
    def of_known_rounding(counted_from: float) -> Tolerance:
        """No value may differ: the simulator returns the integers of this very processor."""
        return Tolerance(counted_from=counted_from)

    @staticmethod
    def of_own_rounding(steps: int, *, wide: bool) -> Tolerance:
        """Any value may differ by the processor's ``steps`` of an 8-bit grid, and a few by more."""
        return Tolerance(
            counted_from=HALF_STEP,
            share=1.0,
            steps=steps * WIDE_OWN_STEPS if wide else steps,
            share_beyond=AMPLIFIED_SHARE,
            times_beyond=AMPLIFIED_TIMES,
        )

    @staticmethod
    def of_equality(counted_from: float) -> Tolerance:
        """No value may differ: integer products, or sums that are exact in float32 as well."""
        # One step: where no value may differ, it only tells a tie from worse in what is reported.
        return Tolerance(counted_from=counted_from, steps=1)

    @staticmethod
    def of_float_products() -> Tolerance:
        """A value may differ as far as the error of float32 sums can carry it."""
        return Tolerance(counted_from=NOISE, share=FLOAT_PRODUCT_SHARE, by_reach=True)

    @property
    def exact(self) -> bool:
        """Whether no value may differ."""
        return self.share == 0

    def counts(self, steps: Steps) -> npt.NDArray[np.bool_]:
        """Where a difference counts; NaN counts everywhere."""
        return ~(steps < self.counted_from) if self.counted_from else steps != 0

    def exceeds(self, steps: Steps, reach: Steps | None = None) -> npt.NDArray[np.bool_]:
        """Where a difference is larger than `steps`, or than ``reach``; NaN is larger than everything."""
        if not self.by_reach:
            return ~(steps < self.steps + HALF_STEP)
        # What is not counted is noise of the dequantized value, and no other integer.
        reached = np.zeros_like(steps) if reach is None else reach
        return self.counts(steps) & ~((reached > 0) & (steps < reached + HALF_STEP))

    def allows(self, *, values: int, mismatches: int, beyond: int, max_steps: float) -> bool:
        """Whether so many values may differ, by so much.

        Parameters
        ----------
        values : int
            Values that were compared.
        mismatches : int
            Those of them that `counts` found.
        beyond : int
            Those of them that `exceeds` found.
        max_steps : float
            Largest difference; NaN is not allowed.
        """
        # One legal tie may fall into any sample, however small.
        most = 0.0 if self.exact else max(1.0, self.share * values)
        # NaN exceeds every reach, so it is counted there.
        within = self.by_reach or max_steps < self.steps * self.times_beyond + HALF_STEP
        return mismatches <= most and beyond <= self.share_beyond * values and within

    def blames(self, steps: Steps, reach: Steps | None = None) -> npt.NDArray[np.bool_]:
        """Where the values are that a refusal names: too far off if some may be, else all that differ."""
        exceeding = self.exceeds(steps, reach)
        return exceeding if self.share_beyond or (self.by_reach and exceeding.any()) else self.counts(steps)


def _check_fraction(name: str, value: object, high: float) -> None:
    # NaN fails every comparison.
    legal = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= high
    if not legal:
        raise ExportError(f"{name} {value!r} is not a number in [0, {high:g}]")


def tolerance_for(
    runtime: Runtime, profile: Profile, plan: LayerPlan, rounding: Rounding, *, from_keys: bool = False
) -> Tolerance:
    """Choose what a runtime is allowed for a graph.

    Parameters
    ----------
    runtime : Runtime
        It knows whether the processor has its own rounding, and whether it reorders float operators.
    profile : Profile
        Profile that the graph was exported for.
    plan : LayerPlan
        Its scales and the grid of its output.
    rounding : Rounding
        Whose integers the simulator returned, see `Reference.rounding`.
    from_keys : bool
        Whether the graph builds L in float32: another order of its sums then breaks equality.
    """
    known, own = rounding is not Rounding.ONNX, runtime.own_steps != 0
    promised = is_exact(profile, plan) and not from_keys
    every_bit = NOISE if runtime.reorders else 0.0
    # The first row that fits: what is known of a processor comes before what ONNX promises.
    match (known, own, promised):
        case (True, _, _):
            return Tolerance.of_known_rounding(HALF_STEP if own else every_bit)
        case (_, True, _):
            return Tolerance.of_own_rounding(runtime.own_steps, wide=plan.output.format.is_wide)
        case (_, _, True):
            return Tolerance.of_equality(every_bit)
        case _:
            return Tolerance.of_float_products()


def is_exact(profile: Profile, plan: LayerPlan) -> bool:
    """Whether profile and scales promise equality with the simulator bit for bit.

    No profile can where the library that computes an exponential decides how it is rounded.
    """
    # Sums of products of 16 bits by 8 may be wider than float32 holds: `reach` says which are.
    narrow = (q.format.container_bits == 8 or q.format.is_float for q in plan.tensors.values())
    powers = (is_power_of_two(q.scale) for q in plan.tensors.values())
    return (profile.exact or (all(narrow) and all(powers))) and not _library_decides(plan)


def _library_decides(plan: LayerPlan) -> bool:
    exponentials = [step for step in plan.program.steps if isinstance(step, Exponential)]
    grids = {(plan.tensors[step.source], plan.tensors[step.output]) for step in exponentials}
    return any(near_ties(q.scale, q.format, r.scale, r.format) for q, r in grids)
