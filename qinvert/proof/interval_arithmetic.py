"""Arithmetic of intervals of integers: a batch of two matrices, their low and their high ends."""

from __future__ import annotations

import torch

from qinvert.formats import INT8, PLANE_RATIO


def split(interval: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the low and the high end."""
    low, high = interval.reshape(-1, 2, *interval.shape[1:]).unbind(1)
    return low, high


def join(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Return the interval between two ends: a batch of two, with the block index slowest."""
    return torch.stack([low, high], 1).flatten(0, 1)


def scaled(interval: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the interval of ``factor * q``, in float64."""
    return oriented(interval.to(torch.float64), factor) * factor


def oriented(interval: torch.Tensor, sign: float) -> torch.Tensor:
    """Return the interval with its ends exchanged where ``sign`` is negative.

    A negative factor makes the high end of a term the low end of the sum.
    """
    low, high = split(interval)
    return join(high, low) if sign < 0 else interval


def magnitude(interval: torch.Tensor) -> torch.Tensor:
    """Return ``max|q|``, elementwise."""
    return torch.maximum(*(end.abs() for end in split(interval)))


def product(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the interval of ``a @ b``, and ``max sum_k |a_ik b_kj|``.

    With midpoints m and radii r of the factors, every ``a @ b`` lies within

        m_a m_b  +-  ((|m_a| + r_a) (|m_b| + r_b) - |m_a| |m_b|).

    The bound is attained where both factors are symmetric about 0, as they
    are here up to the one extra negative step of a grid; elsewhere it is at
    most 1.5 times too wide.  Float64 holds it exactly: all terms are multiples
    of 1/4 far below 2^51.

    References
    ----------
    S. M. Rump, "Fast and parallel interval arithmetic", BIT 39 (1999).
    """
    (a, a_largest), (b, b_largest) = _midpoint(left), _midpoint(right)
    middle = a @ b
    largest = a_largest @ b_largest
    radius = largest - a.abs() @ b.abs()
    return join(torch.ceil(middle - radius), torch.floor(middle + radius)), largest


def elementwise(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the interval of ``a * b``, spread over the larger shape, and ``max|a * b|``."""
    lefts, rights = ([end.to(torch.float64) for end in split(interval)] for interval in (left, right))
    corners = torch.stack([a * b for a in lefts for b in rights])
    ends = join(corners.amin(0), corners.amax(0))
    return ends, magnitude(ends)


def _midpoint(interval: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = split(interval.to(torch.float64))
    # |m| + r is the larger magnitude of the two ends.
    return (low + high) / 2, torch.maximum(low.abs(), high.abs())


def low_plane(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Return the interval of the low plane: between two different high planes it takes every value."""
    first, second = split(high)
    start, stop = split(low)
    same = first == second
    return join(torch.where(same, start, float(INT8.minimum)), torch.where(same, stop, float(INT8.maximum)))


def low_plane_saturates(interval: torch.Tensor) -> bool:
    """Whether values of an interval, in steps of the low plane, may end beyond the low plane's grid.

    The high plane is rounded first: the rest of what rounds to ``256 h + 128``
    is 128 steps, and the low plane ends at 127.
    """
    low, high = split(interval.to(torch.float64))
    tie = INT8.maximum + 1
    # How many of the numbers 256 h + 128 lie in [low, high].
    ties = torch.floor((high - tie) / PLANE_RATIO) - torch.ceil((low - tie) / PLANE_RATIO) + 1
    return bool((ties > 0).any())
