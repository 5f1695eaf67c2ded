"""Errors of single heads: what the sqnr of a whole layer hides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from qinvert.errors import PlanError

if TYPE_CHECKING:
    from qinvert.metrics import ErrorStatistics, NoiseStatistics

#: A head with at least this share of its layer's signal is judged by the goal.  Below it, T of the
#: head is the identity but for entries that vanish beside those of the other heads.
CARRIES: Final = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadErrors:
    """One head of a layer."""

    #: Number of the head.
    head: int
    #: Sqnr of the head's own T.
    sqnr_db: float
    #: Share of the head in the signal of the layer, the sum of squares of T - I.
    signal_share: float
    #: Share of the head in the sum of squares of the layer's output; None where there is no model.
    output_share: float | None = None
    #: ``20 log10(||o|| / ||o_hat - o||)`` of the head's own output; None where there is no model.
    output_sqnr_db: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.signal_share <= 1:
            raise PlanError(f"head {self.head} has the share {self.signal_share!r}; shares are in [0, 1]")

    @property
    def carries_signal(self) -> bool:
        """Whether the goal of the layer should hold for the head."""
        return self.signal_share >= CARRIES


def head_errors(statistics: Mapping[int, ErrorStatistics]) -> tuple[HeadErrors, ...]:
    """Return the errors of every head of one layer, in the order of the heads."""
    total = sum(head.signal for head in statistics.values()) or 1.0
    # Where the signal is NaN or infinite no head may hide behind another one.
    known, equal = math.isfinite(total), 1 / max(1, len(statistics))
    return tuple(
        HeadErrors(head=number, sqnr_db=head.sqnr_db, signal_share=head.signal / total if known else equal)
        for number, head in sorted(statistics.items())
    )


def with_outputs(
    heads: Sequence[HeadErrors], outputs: Mapping[int, NoiseStatistics]
) -> tuple[HeadErrors, ...]:
    """Return the heads with the errors of their outputs."""
    total = sum(output.signal for output in outputs.values()) or 1.0
    return tuple(
        replace(head, output_share=output.signal / total, output_sqnr_db=output.sqnr_db)
        for head in heads
        for output in (outputs[head.head],)
    )


def worst_head(heads: Sequence[HeadErrors]) -> HeadErrors | None:
    """Return the head with the least sqnr among those that carry signal; None where no head does."""
    return min((head for head in heads if head.carries_signal), key=lambda h: h.sqnr_db, default=None)


def heads_below(heads: Sequence[HeadErrors], goal_db: float) -> list[HeadErrors]:
    """Return the heads that carry signal and stay below a goal; one head alone is the layer itself."""
    return [h for h in heads if h.carries_signal and h.sqnr_db < goal_db] if len(heads) > 1 else []
