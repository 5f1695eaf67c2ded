"""Why candidates were not chosen, in words; plans hold them, and pages read them."""

from __future__ import annotations

import math
from typing import Final

from qinvert.formats import IntFormat

#: What `growth_reason` starts with.
GROWS: Final = "its powers outgrow the inverse"
#: Of a candidate that reaches the goals and was not chosen.
ALIKE: Final = "in simulation it is no better than the chosen one"
#: Fewer lost bits than this are not counted.
COUNTED_BITS: Final = 0.05


def growth_reason(times: float, fmt: IntFormat) -> str:
    """Say what powers that outgrow the inverse cost: their grids are as much coarser."""
    bits = (fmt.maximum - fmt.minimum).bit_length()
    lost = math.log2(min(times, 2.0**bits))
    if lost < COUNTED_BITS:
        return f"{GROWS} a little, and nothing bounds them on other data"
    return f"{GROWS} {times:.3g} times: {lost:.1f} of {bits} bits are lost"


def lack_reason(sqnr_db: float, goal_db: float) -> str:
    """Say how far a candidate stays below the goal."""
    return f"it lacks {goal_db - sqnr_db:.1f} dB to the goal of {goal_db:g} dB"


def floor_reason(loss_db: float, max_loss_db: float) -> str:
    """Say how much more a candidate loses than its grids make it lose."""
    return f"it stays {loss_db:.1f} dB below what its grids allow, and {max_loss_db:g} dB are accepted"
