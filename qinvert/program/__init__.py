"""Programs: a flat list of typed steps between named ports, as pure data."""

from __future__ import annotations

from qinvert.program.evaluator import Evaluator as Evaluator
from qinvert.program.program import Program as Program

__all__ = ["Evaluator", "Program"]
