"""The gated delta rule by chunks, with a pluggable inverse, and L from keys and gates."""

from __future__ import annotations

from qinvert.delta_rule.chunks import DeltaChunks as DeltaChunks
from qinvert.delta_rule.from_keys import from_dplr as from_dplr
from qinvert.delta_rule.from_keys import from_keys as from_keys
from qinvert.delta_rule.rule import chunk_gated_delta_rule as chunk_gated_delta_rule

__all__ = ["DeltaChunks", "chunk_gated_delta_rule", "from_dplr", "from_keys"]
