"""Warnings of `qinvert.calibrate`: goals that were missed, and figures that rest on too little data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

from qinvert.cautions import DataWarning, MissedGoalWarning, QInvertWarning
from qinvert.formats import INT4, INT8, INT8X2, INT16, INT16_WHOLE, IntFormat
from qinvert.plan.plan import Plan
from qinvert.profiles import DEFAULT_TARGETS, PROFILES, Profile

#: Sqnr that grids of a format do not exceed, unless values happen to lie on them: of values
#: spread evenly over the grid, ``10 log10(4 largest^2)``.
REACH: Final = {INT4.name: 23.0, INT8.name: 48.0, INT8X2.name: 96.0, INT16.name: 96.0, INT16_WHOLE.name: 96.0}
#: Layers that one warning names.
NAMED: Final = 3


def reach(formats: Sequence[IntFormat]) -> float:
    """Return the sqnr that the widest of the formats may reach."""
    return max(REACH.get(fmt.name, REACH[INT8.name]) for fmt in formats)


def warn_beyond_reach(goal_db: float, profile: Profile, formats: Sequence[IntFormat]) -> None:
    """Warn before any work if the goal is above what the formats can reach."""
    message = beyond_reach(goal_db, profile, formats)
    if message:
        _warn(message, MissedGoalWarning, stacklevel=4)


def beyond_reach(goal_db: float, profile: Profile, formats: Sequence[IntFormat]) -> str:
    """Return why a goal cannot be reached and which targets can; empty where it may be reached."""
    most = reach(formats)
    if goal_db <= most:
        return ""
    named = ", ".join(fmt.name for fmt in formats)
    given = (
        f"min_sqnr_db={goal_db:g} is beyond {named} on target {profile.name!r}, which end near {most:g} dB"
    )
    wider = [fmt for fmt in profile.formats if reach([fmt]) >= goal_db]
    if wider:
        return f"{given}; this target also takes {', '.join(fmt.name for fmt in wider)}: pass bits='auto'"
    first = [name for name in DEFAULT_TARGETS if reach(PROFILES[name].formats) >= goal_db]
    rest = [name for name in PROFILES if name not in first and reach(PROFILES[name].formats) >= goal_db]
    if not (first or rest):
        return f"{given}; no target reaches it: pass min_sqnr_db={max(REACH.values()):g} or less"
    return f"{given}; pass target={first[0]!r}, or another of {', '.join([*first, *rest])}"


def warned(plan: Plan) -> Plan:
    """Return a plan, with warnings of every goal that it misses and every figure that rests on too little."""
    missed = {name: _missed(layer.provenance) for name, layer in plan.layers.items()}
    _warn_each("misses its goal", {name: text for name, text in missed.items() if text}, MissedGoalWarning)
    for name in ("head_cautions", "data_cautions"):
        texts = {n: "; ".join(layer.provenance.get(name, ())) for n, layer in plan.layers.items()}
        kind = MissedGoalWarning if name == "head_cautions" else DataWarning
        _warn_each("has a caution", {n: text for n, text in texts.items() if text}, kind)
    return plan


def _missed(facts: Mapping[str, Any]) -> str:
    if facts["meets_goal"]:
        return ""
    # A layer without a matrix has no figure, and its fix is also its caution.
    return "" if facts.get("unseen", {}) is None else f"{facts['expected_sqnr_db']:.1f} dB; {facts['fix']}"


def _warn_each(what: str, texts: Mapping[str, str], kind: type[QInvertWarning]) -> None:
    if not texts:
        return
    named = [f"layer {name!r} {what}: {text}" for name, text in list(texts.items())[:NAMED]]
    more = f"; and {len(texts) - NAMED} more layers" if len(texts) > NAMED else ""
    _warn(" | ".join(named) + more, kind, stacklevel=5)


def _warn(message: str, kind: type[QInvertWarning], stacklevel: int) -> None:
    # The line that is named should be that of the caller of `qinvert.calibrate`.
    warnings.warn(message, kind, stacklevel=stacklevel)
