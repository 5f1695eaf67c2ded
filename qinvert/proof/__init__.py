"""What holds for a plan with every input: intervals of integers, and the facts that follow from them."""

from __future__ import annotations

from qinvert.proof.proof import Proof as Proof
from qinvert.proof.proof import prove as prove

__all__ = ["Proof", "prove"]
