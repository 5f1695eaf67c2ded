"""Everything that qinvert warns of by Python's `warnings`.

A warning says what was reached, why, and what would change that.
"""

from __future__ import annotations


class QInvertWarning(UserWarning):
    """Base class of every warning: the result stands, but not for what was asked."""


class MissedGoalWarning(QInvertWarning):
    """A plan that does not reach a goal, or a goal that its target cannot reach."""


class DataWarning(QInvertWarning):
    """Calibration data that is too small for the figures that were derived from it."""
