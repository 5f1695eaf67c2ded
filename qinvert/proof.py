"""What a plan guarantees for every input, without running it."""

from __future__ import annotations

from dataclasses import dataclass

from qinvert.arithmetic import FLOAT32_EXACT, MIN_SCALE
from qinvert.plan import LayerPlan
from qinvert.steps import MatMul, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Facts that follow from formats, scales and shapes alone."""

    #: Largest magnitude that any accumulator can reach.
    accumulator_bound: int
    #: Step in which it can.
    accumulator_step: str
    #: Smallest scale of the plan.
    smallest_scale: float
    #: Tensors with a proved range, for unit keys and ``beta <= 1``.
    bounded: int
    #: Those whose grid ends before their proved range does, by name.
    may_saturate: dict[str, float]

    @property
    def exact_in_float32(self) -> bool:
        """Whether back ends that emulate int32 accumulators in float32 stay exact."""
        return self.accumulator_bound < FLOAT32_EXACT

    def __str__(self) -> str:
        exact = "yes" if self.exact_in_float32 else "no"
        covered = self.bounded - len(self.may_saturate)
        lines = [
            f"accumulators: at most {self.accumulator_bound:,} ({self.accumulator_step}), "
            f"fit int32; exact where emulated in float32: {exact}",
            f"scales: at least {self.smallest_scale:.3g} (limit {MIN_SCALE:g})",
            f"ranges: {covered} of {self.bounded} tensors with a proved range (beta <= 1) cover it whole",
        ]
        if self.may_saturate:
            name, limit = min(self.may_saturate.items(), key=lambda item: item[1])
            lines.append(
                f"  narrowest: {name} ends at {limit:.3g}; larger values than calibration showed saturate"
            )
        return "\n".join(lines)


def prove(plan: LayerPlan) -> Proof:
    """Return the facts; a plan that exists already satisfies the int32 limit."""
    bounds = {
        step.output: plan.accumulator_bound(step) for step in plan.program.steps if isinstance(step, MatMul)
    }
    widest = max(bounds, key=lambda name: bounds[name], default="none")
    bounded = [step for step in plan.program.steps if step.bound is not None]
    return Proof(
        accumulator_bound=bounds.get(widest, 0),
        accumulator_step=widest,
        smallest_scale=min(q.scale for q in plan.tensors.values()),
        bounded=len(bounded),
        may_saturate={s.output: _limit(plan, s) for s in bounded if not _covers(plan, s)},
    )


def _limit(plan: LayerPlan, step: Step) -> float:
    return plan.tensors[step.output].limit


def _covers(plan: LayerPlan, step: Step) -> bool:
    # Half a step beyond the limit still rounds onto it.
    half_step = plan.tensors[step.output].scale / 2
    return step.bound is not None and _limit(plan, step) + half_step >= step.bound
