"""What happens to values before their grid and to outputs after it, exactly in real arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qinvert.checks import check_power_of_two
from qinvert.errors import PlanError

#: Largest exponent of a factor, of either sign.
MAX_EXPONENT: Final = 60
#: Largest number of heads of a layer.
MAX_HEADS: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueChannels:
    """``v' = (v 2^-e) R`` channel by channel, ``S' = (S 2^-e) R``, ``o = (o' R^T) 2^e``.

    The whole delta rule is linear in v and S, each channel of a value for itself,
    so that any invertible map of value channels commutes with it.  Powers of two
    are exact in floating point, too.  R is the identity, or the Hadamard matrix
    divided by ``sqrt(Dv)``, which spreads an outlier over all channels.

    Raises
    ------
    PlanError
        At construction, for numbers that are not legal.
    """

    #: e of every head and channel, ``[H][Dv]``; one row stands for all heads.
    exponents: tuple[tuple[int, ...], ...]
    #: Whether R is the Hadamard matrix; Dv is then a power of two.
    rotated: bool = False

    def __post_init__(self) -> None:
        rows = self.exponents
        legal = 0 < len(rows) <= MAX_HEADS and len({len(row) for row in rows}) == 1 and len(rows[0]) > 0
        numbers = legal and all(
            isinstance(e, int) and not isinstance(e, bool) and abs(e) <= MAX_EXPONENT
            for row in rows
            for e in row
        )
        if not numbers:
            raise PlanError(
                f"exponents of value channels must be integers of at most {MAX_EXPONENT} in magnitude, "
                "one row of equal length for each head; calibrate again"
            )
        if self.rotated:
            check_power_of_two("value_size", self.value_size, 1, 2**20, PlanError, "; leave out the rotation")

    @property
    def heads(self) -> int:
        """Number of heads that have exponents of their own; 1 if all share them."""
        return len(self.exponents)

    @property
    def value_size(self) -> int:
        """Number of channels, Dv."""
        return len(self.exponents[0])

    @property
    def changes_nothing(self) -> bool:
        """Whether values pass as they are."""
        return not self.rotated and not any(any(row) for row in self.exponents)
