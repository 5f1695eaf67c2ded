"""What a plan guarantees, without running it on data.

Two kinds of proof meet here, and neither contains the other.

* *Intervals* of integers (`qinvert.proof.intervals`) hold for the integer program
  itself, roundings included, for every input within ``limit``.  They show that
  accumulators never wrap, and which tensors cannot saturate.
* *Range bounds* of the method (``max|x| <= bound * max(beta)`` for unit keys,
  see `qinvert.program.steps`) concern exact arithmetic.  Rounding errors of earlier
  steps may push an integer a little beyond them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qinvert.checks import check_magnitude
from qinvert.chunk_step.ports import BETA, step_bounds
from qinvert.errors import PlanError
from qinvert.numerics.accumulators import FLOAT32_EXACT, INT32_LIMIT
from qinvert.numerics.scales import MIN_SCALE
from qinvert.plan.quantization import Quantization
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.step_list import StepList
from qinvert.program.steps import MIN_BETA, Scale
from qinvert.proof.intervals import propagate


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Facts that follow only from formats, scales and steps.

    Every tensor is in one of `cannot_saturate`, `covered`, `may_saturate`,
    `partial` and `unproved`.
    """

    #: Step -> largest magnitude of any partial sum in its accumulators.
    accumulators: Mapping[str, int]
    #: Smallest scale of the plan.
    smallest_scale: float
    #: Tensors with a proved range, for unit keys and ``beta <= max_beta``.
    bounded: int
    #: Tensors whose intervals show that no input saturates them.
    cannot_saturate: tuple[str, ...]
    #: Other tensors whose grid covers their proved range in exact arithmetic.
    covered: tuple[str, ...]
    #: Other tensors whose grid ends before their proved range, each with the end of its grid.
    may_saturate: dict[str, float]
    #: Other tensors of partial steps: no result depends on the values that saturate there.
    partial: tuple[str, ...]
    #: The other tensors.  They have no proved range: only calibration says how large they get.
    unproved: tuple[str, ...]
    #: Assumed largest |M|, or largest magnitude of inputs by name; None for any M.
    limit: float | Mapping[str, float] | None
    #: Assumed largest beta; of a chunk step, the one that it was built for.
    max_beta: float
    #: Whether the program computes an inverse, so that its input is M.
    of_inverse: bool = True

    @property
    def accumulator_step(self) -> str:
        """Step with the widest accumulator."""
        return max(self.accumulators, key=lambda name: self.accumulators[name], default="none")

    @property
    def accumulator_bound(self) -> int:
        """Largest magnitude that any accumulator can reach."""
        return max(self.accumulators.values(), default=0)

    @property
    def headroom_bits(self) -> dict[str, int]:
        """Step -> how often its accumulators may double before int32 overflows."""
        width = (INT32_LIMIT - 1).bit_length()
        return {name: width - bound.bit_length() for name, bound in self.accumulators.items()}

    @property
    def exact_in_float32(self) -> bool:
        """Whether back ends that emulate int32 accumulators in float32 stay exact."""
        return self.accumulator_bound < FLOAT32_EXACT

    def __str__(self) -> str:
        exact = "yes" if self.exact_in_float32 else "no"
        spare = min(self.headroom_bits.values(), default=(INT32_LIMIT - 1).bit_length())
        inputs = "any inputs" if self.limit is None and not self.of_inverse else _promise(self.limit)
        lines = [
            f"accumulators: at most {self.accumulator_bound:,} ({self.accumulator_step}), "
            f"fit int32 with {spare} bits to spare; exact where emulated in float32: {exact}",
            f"scales: at least {self.smallest_scale:.3g} (limit {MIN_SCALE:g})",
            f"saturation: impossible in {len(self.cannot_saturate)} of {self._tensors} tensors, for {inputs}",
            f"ranges: {self.bounded - len(self.may_saturate)} of {self.bounded} tensors with a proved range "
            f"(unit keys, beta <= {self.max_beta:.3g}, exact arithmetic) cover it or cannot saturate",
        ]
        if self.may_saturate:
            name, end = min(self.may_saturate.items(), key=lambda item: item[1])
            lines.append(
                f"  narrowest: {name} ends at {end:.3g}; larger values than calibration showed saturate"
            )
        if self.partial:
            lines.append(
                f"partial: no result depends on what saturates in {len(self.partial)} tensors, "
                f"{self.partial[0]} first"
            )
        if self.unproved:
            lines.append(
                f"no proof: {len(self.unproved)} tensors rest on calibration, {self.unproved[0]} first"
            )
        return "\n".join(lines)

    @property
    def _tensors(self) -> int:
        groups = (self.cannot_saturate, self.covered, self.may_saturate, self.partial, self.unproved)
        return sum(map(len, groups))


def _promise(limit: float | Mapping[str, float] | None) -> str:
    if limit is None:
        return "any M"
    if isinstance(limit, Mapping):
        return ", ".join(f"|{name}| <= {value:.3g}" for name, value in limit.items())
    return f"|M| <= {limit:.3g}"


def prove(
    plan: QuantizedProgram, limit: float | Mapping[str, float] | None = None, max_beta: float = 1.0
) -> Proof:
    """Return the facts; a plan that exists already satisfies the int32 limit.

    Parameters
    ----------
    plan : QuantizedProgram
    limit : float or mapping, optional
        Guaranteed largest |M|, in real units (|K| where the program is
        factored), or largest magnitudes by the names of inputs.  None promises
        nothing: inputs saturate when they are quantized.
    max_beta : float
        Guaranteed largest beta, for the range bounds; they hold for unit keys.

    Raises
    ------
    PlanError
        If ``limit`` or ``max_beta`` is not a number of at least 0.
    """
    check_magnitude("max_beta", max_beta, PlanError, "pass the largest beta, 1.0 or 2.0 for most models")
    max_beta = step_bounds(plan.program).get(BETA, max_beta)
    intervals = propagate(plan, limit)
    proved = set(intervals.cannot_saturate)
    bounds = _bounds(plan.program, max_beta)
    covered = {name for name, bound in bounds.items() if _covers(plan.tensors[name], bound)}
    partial = plan.program.partial_tensors
    open_ = [name for name in plan.program.tensors if name not in proved | covered]
    return Proof(
        accumulators={
            step: max(accumulator.largest for accumulator in accumulators)
            for step, accumulators in intervals.accumulators.items()
        },
        smallest_scale=min(q.scale for q in plan.tensors.values()),
        bounded=len(bounds),
        cannot_saturate=intervals.cannot_saturate,
        covered=tuple(name for name in bounds if name in covered - proved),
        may_saturate={name: plan.tensors[name].limit for name in open_ if name in bounds},
        partial=tuple(name for name in open_ if name in partial),
        unproved=tuple(name for name in open_ if name not in partial | bounds.keys()),
        limit=limit,
        max_beta=max_beta,
        of_inverse=plan.program.is_inverse,
    )


def _bounds(program: StepList, max_beta: float) -> dict[str, float]:
    """Return the proved ranges: those of the steps, and of the inputs of an inverse."""
    bounds = {s.output: s.bound for s in program.steps if s.bound is not None}
    if not program.is_inverse:
        # Other programs have ranges without beta, such as exponentials, beside those with it.
        return step_bounds(program) | bounds
    # |M[i, j]| = beta_i |<k_i, k_j>| exp(G_i - G_j), and decay never grows.
    ports = program.inverse_ports
    bounds = {ports.matrix: 1.0} | bounds
    if ports.beta is None:
        return {name: bound * max_beta for name, bound in bounds.items()}
    # K = M / beta and W hold no beta; the divisor is at least MIN_BETA.
    largest = max(max_beta, MIN_BETA)
    scaled = {step.output for step in program.steps if isinstance(step, Scale)}
    bounds = {name: bound * (largest if name in scaled else 1.0) for name, bound in bounds.items()}
    return bounds | {ports.beta: largest}


def _covers(grid: Quantization, bound: float) -> bool:
    # A value half a step beyond the limit still rounds onto it.
    return grid.limit + grid.scale / 2 >= bound
