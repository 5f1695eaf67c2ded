"""What candidates cost: on a chip with a table, or in the multiply-accumulates of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from qinvert.calibration.choices import BITS
from qinvert.checks import check_integer
from qinvert.errors import PlanError
from qinvert.formats import INT8
from qinvert.hardware import MAX_BATCH, Hardware, find_hardware
from qinvert.plan.cost import plan_cost
from qinvert.plan.far_sums import far_sums_cost
from qinvert.plan.plan import LayerPlan
from qinvert.profiles import Profile, default_target, find_profile

#: Unit of costs where no chip has a table.
MULTIPLY_ACCUMULATES = "int8 multiply-accumulates per matrix"


class Compiled(NamedTuple):
    """What a compiler says of one plan."""

    #: Infinite if it refuses the graph.
    cost: float
    #: Parts of the batch with which the graph costs this.
    chains: int


#: Compiles ``(plan, target, batch)``.
Measure: TypeAlias = Callable[[LayerPlan, str, int], Compiled]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """How plans are compared, and for which target."""

    profile: Profile
    #: None where the target's costs are those of `qinvert.plan.cost`.
    hardware: Hardware | None
    #: Matrices per call.
    batch: int
    #: Whether the caller named the chip.
    named: bool
    #: Profiles of the chip to choose the target from; empty where the caller named a target or no chip.
    targets: tuple[str, ...]
    #: Compiles the best few candidates; None where the table decides.
    measure: Measure | None = None

    def of(self, plan: LayerPlan) -> float:
        """Return the cost of one plan, with as many chains as cost the least."""
        if self.hardware is not None:
            return self.hardware.best_chains(plan, self.batch)[1]
        return plan_cost(plan) + (far_sums_cost(plan) if self.profile.quantized_everywhere else 0)

    def measured(self, plan: LayerPlan) -> Compiled | None:
        """Return what the compiler says of a plan, None without a compiler."""
        return None if self.measure is None else self.measure(plan, self.target_of([plan]), self.batch)

    def chains(self, plan: LayerPlan, compiled: Compiled | None = None) -> dict[str, Any]:
        """Return the number of chains for the provenance of a layer."""
        if self.hardware is None:
            return {}
        return {"chains": compiled.chains if compiled else self.hardware.best_chains(plan, self.batch)[0]}

    @property
    def provenance(self) -> dict[str, Any]:
        """What a plan says of its costs."""
        if self.hardware is None:
            return {"cost_unit": MULTIPLY_ACCUMULATES}
        return {
            "hardware": self.hardware.name,
            "batch": self.batch,
            "cost_unit": f"{self.hardware.unit} for {self.batch} matrices",
        }

    def target_of(self, layers: Iterable[LayerPlan]) -> str:
        """Return the target of a whole plan: the chip's first profile that holds every layer."""
        formats = {grid.format for layer in layers for grid in layer.tensors.values()}
        fits = (name for name in self.targets if formats <= set(find_profile(name).formats))
        return next(fits, self.profile.name)


def costs_for(
    target: str | None,
    hardware: str | None,
    bits: int | str,
    batch: int,
    measure: Measure | None = None,
    *,
    steps: bool = False,
) -> Costs:
    """Return the costs for what a caller named; each of them may be None.

    Plans of whole chunk ``steps`` may have other targets on a chip than those of inverses.

    Raises
    ------
    ExportError, PlanError
        If one of them is not known, or the batch is not legal.
    """
    check_integer("batch", batch, 1, MAX_BATCH, PlanError, "; pass the matrices per call")
    targets: tuple[str, ...] = ()
    if target is not None:
        profile = find_profile(target)
    elif hardware is None:
        profile = find_profile(default_target(BITS.get(str(bits), INT8)))
    else:
        chip = find_hardware(hardware)
        targets = (steps and chip.step_targets) or chip.targets
        profile = _profile_of(targets, bits)
    name = profile.hardware if hardware is None else hardware
    return Costs(
        profile=profile,
        hardware=find_hardware(name) if name else None,
        batch=batch,
        named=hardware is not None,
        targets=targets,
        measure=measure,
    )


def _profile_of(targets: Iterable[str], bits: int | str) -> Profile:
    """Return the chip's profile with the most formats, or the first that takes ``bits``."""
    profiles = [find_profile(name) for name in targets]
    wanted = BITS.get(str(bits))
    if wanted is None:
        return max(profiles, key=lambda profile: len(profile.formats))
    width = wanted.container_bits * wanted.planes
    fits = [p for p in profiles if any(f.container_bits * f.planes == width for f in p.formats)]
    return fits[0] if fits else profiles[0]
