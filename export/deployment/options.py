"""What `qinvert.deploy` lets a caller choose of its graphs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from qinvert.checks import check_integer, check_member
from qinvert.errors import ExportError

#: Tokens that the caches of attention layers hold, if the caller does not say.
CACHE: Final = 1024
#: Largest cache and window.
MAX_CACHE: Final = 2**20
MAX_CHUNKS: Final = 64
#: Weights that share a scale in four bits: so many in a row of one output channel.
BLOCK: Final = 32
#: Operator set in which QuantizeLinear knows int16, int4 and blocks.
OPSET: Final = 21
#: Widths of activations.
ACTIVATION_BITS: Final = (8, 16)


class Weights(StrEnum):
    """How the weights of projections, MLPs and the head are stored."""

    #: float32, as are their activations.
    NONE = "none"
    #: int8, one scale for each output channel; activations on a grid for each tensor.
    W8 = "w8"
    #: int4, one scale for each `BLOCK` weights of an output channel; activations as in w8.
    W4 = "w4"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployOptions:
    """Sizes of the graphs, and the types of their weights.

    Raises
    ------
    ExportError
        At construction, for a size or a type that is not legal.
    """

    #: Chunks of a call of the prefill graph.
    chunks: int = 1
    #: Tokens that the caches of attention layers hold.
    cache: int = CACHE
    #: How weights of projections, MLPs and the head are stored.
    weights: str = Weights.NONE
    #: Bits of the activations of products with integer weights.
    activation_bits: int = 16

    def __post_init__(self) -> None:
        check_integer("chunks", self.chunks, 1, MAX_CHUNKS, ExportError, "; pass for example 2")
        check_integer("cache", self.cache, 1, MAX_CACHE, ExportError, f"; pass for example {CACHE}")
        check_member(Weights, "weights", self.weights, ExportError)
        if self.activation_bits not in ACTIVATION_BITS:
            raise ExportError(f"activations of {self.activation_bits!r} bits are not known; pass 8 or 16")

    @property
    def opset(self) -> int | None:
        """Least operator set that has the types of the weights."""
        return None if self.weights == Weights.NONE else OPSET

    def positions(self, chunk: int) -> int:
        """How many positions a deployment knows: those in the cache, and those of a window behind it."""
        return self.cache + self.chunks * chunk
