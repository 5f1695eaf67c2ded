"""What a caller may choose about grids; nothing else is imported here, so that help on it comes at once."""

from __future__ import annotations

from enum import StrEnum


class ScaleRule(StrEnum):
    """Which scales are allowed."""

    #: Any float32: reciprocals of odd integers where that costs little (no exact ties
    #: arise on such grids), or where a residual term needs 1.0 on the grid.
    FLOAT = "float"
    #: Powers of two: every product and sum is exact in float32, in any order.
    POW2 = "pow2"


class RangeRule(StrEnum):
    """What range a grid covers."""

    #: Every value seen in calibration.
    MAX = "max"
    #: All but one in 10,000 of the sample's nonzero magnitudes.
    PERCENTILE = "percentile"
    #: The range with the least mean square error on the sample, saturation included.
    MSE = "mse"


class Granularity(StrEnum):
    """What shares one set of grids."""

    #: All matrices of a layer.
    TENSOR = "tensor"
    #: The matrices of one head.
    HEAD = "head"
