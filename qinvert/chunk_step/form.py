"""How a chunk step applies the inverse, and how its log decays are given."""

from __future__ import annotations

from enum import StrEnum


class Form(StrEnum):
    """Where beta and the decays enter: all forms are equal in exact arithmetic."""

    #: ``V' = T (beta v - beta exp(G) (k S))``: beta and decays multiply rows of values.
    STATE = "state"
    #: ``V' = T (beta v) - (T (beta exp(G) k)) S``: U and W, as the papers write it.
    WY = "wy"
    #: ``V' = (T beta) (v - (exp(G) k) S)``: beta in the columns of T and decays in the keys, so that
    #: no row of values is multiplied by anything.
    FOLDED = "folded"


class Decay(StrEnum):
    """How many log decays a token has."""

    #: One for each head (Gated DeltaNet).
    SCALAR = "scalar"
    #: One for each channel of a key (Kimi Delta Attention).
    CHANNEL = "channel"
