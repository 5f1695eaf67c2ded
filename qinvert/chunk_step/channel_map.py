"""The matrices by which values enter and leave the channels of a plan, see `ValueChannels`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qinvert.plan.value_channels import ValueChannels

Array = npt.NDArray[np.float32]


def channel_factors(channels: ValueChannels, *, leaving: bool) -> Array:
    """``2^-e`` of every head and channel, or ``2^e`` where values leave: float32 ``[H or 1, Dv]``, exact."""
    exponents = np.array(channels.exponents, dtype=np.int64)
    factors: Array = np.ldexp(np.float32(1), exponents if leaving else -exponents)
    return factors


def rotation(size: int) -> npt.NDArray[np.float64]:
    """Return the Hadamard matrix of Sylvester divided by ``sqrt(size)``: symmetric, and its own inverse."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(size))
