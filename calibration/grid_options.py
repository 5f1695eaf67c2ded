"""The options of `qinvert.calibrate` that choose grids, for plans of any scope."""

from __future__ import annotations

from dataclasses import dataclass

from qinvert.calibration.choices import HARDWARE_LOSS_DB, MAX_LOSS_DB, RangeRule, ScaleRule, format_of
from qinvert.calibration.planning.costs import Costs
from qinvert.calibration.planning.grids import GridRules
from qinvert.calibration.planning.planner import Goals
from qinvert.checks import check_decibels, check_member
from qinvert.errors import PlanError
from qinvert.formats import INT4, IntFormat
from qinvert.profiles import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class GridOptions:
    """The checked arguments of `calibrate` that choose grids."""

    profile: Profile
    costs: Costs
    ladder: tuple[IntFormat, ...]
    rules: GridRules
    goals: Goals


def grid_options(
    bits: int | str,
    scales: str,
    ranges: str,
    min_sqnr_db: float,
    max_loss_db: float | None,
    costs: Costs,
) -> GridOptions:
    """Return the checked options of `qinvert.calibrate` that choose grids.

    Raises
    ------
    PlanError
        If one is not legal, or the target does not take the format.
    """
    profile = costs.profile
    ladder = _ladder(bits, profile)
    if max_loss_db is None:
        max_loss_db = HARDWARE_LOSS_DB if costs.named else MAX_LOSS_DB
    return GridOptions(
        profile=profile,
        costs=costs,
        ladder=ladder,
        rules=GridRules(
            scales=_scale_rule(scales, profile),
            ranges=_range_rule(ranges, ladder),
            requantize=profile.requantize,
            folds=profile.quantized_everywhere,
        ),
        goals=Goals(
            min_sqnr_db=check_decibels("min_sqnr_db", min_sqnr_db, PlanError),
            max_loss_db=check_decibels("max_loss_db", max_loss_db, PlanError),
        ),
    )


def _scale_rule(scales: str, profile: Profile) -> ScaleRule:
    needed = ScaleRule.POW2 if profile.power_of_two_scales else ScaleRule.FLOAT
    if scales == "auto":
        return needed
    chosen = check_member(ScaleRule, "scales", scales, PlanError, ("auto",))
    if needed is ScaleRule.POW2 and chosen is ScaleRule.FLOAT:
        raise PlanError(
            f"target {profile.name!r} takes power-of-two scales only, not scales={str(scales)!r}; "
            "use scales='pow2' or another target"
        )
    return chosen


def _range_rule(ranges: str, ladder: tuple[IntFormat, ...]) -> RangeRule:
    if ranges == "auto":
        return RangeRule.MSE if ladder[0] == INT4 else RangeRule.MAX
    return check_member(RangeRule, "ranges", ranges, PlanError, ("auto",))


def _ladder(bits: int | str, profile: Profile) -> tuple[IntFormat, ...]:
    if str(bits) == "auto":
        # int4 lies in int8 containers: no target multiplies it faster.
        wide = [fmt for fmt in profile.formats if fmt != INT4]
        return tuple(sorted(wide, key=lambda fmt: fmt.largest)) or profile.formats[:1]
    fmt = format_of(bits, profile)
    if fmt not in profile.formats:
        names = ", ".join(f.name for f in profile.formats)
        raise PlanError(
            f"target {profile.name!r} takes {names}, not {fmt}; choose other bits or another target"
        )
    return (fmt,)
