"""Plans: a program with an integer format and a scale for every tensor."""

from __future__ import annotations

from qinvert.plan.plan import LayerPlan as LayerPlan
from qinvert.plan.plan import Plan as Plan
from qinvert.plan.quantization import Quantization as Quantization
from qinvert.plan.quantization import Requantize as Requantize

__all__ = ["LayerPlan", "Plan", "Quantization", "Requantize"]
