"""What a caller may choose about grids; this module loads nothing heavy, so that help appears at once."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from qinvert.errors import PlanError
from qinvert.formats import INT4, INT8, INT8X2, INT16, INT16_WHOLE, IntFormat
from qinvert.profiles import Profile

#: The format for each value of ``bits``; the value "auto" chooses among the formats of the target.
BITS: Final[dict[str, IntFormat]] = {"4": INT4, "8": INT8, "16": INT16, "8x2": INT8X2}
#: Goal for the sqnr of T where a caller names none.
MIN_SQNR_DB: Final = 20.0
#: A method may lose this much against the floor before ``auto`` moves on.
MAX_LOSS_DB: Final = 1.0
#: The same where a chip is named, on which every decibel has its price.
HARDWARE_LOSS_DB: Final = 3.0


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
    #: All matrices of a layer, or those of one head in layers whose heads need it.
    AUTO = "auto"


def format_of(bits: int | str, profile: Profile) -> IntFormat:
    """Return the format for a value of ``bits`` other than "auto", as the profile multiplies it.

    Raises
    ------
    PlanError
        If there is no such value.
    """
    fmt = BITS.get(str(bits))
    if fmt is None:
        raise PlanError(f"bits {bits!r} is not supported; use auto, {', '.join(BITS)}")
    return INT16_WHOLE if fmt is INT16 and profile.multiplies_wide else fmt
