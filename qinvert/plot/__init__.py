"""Figures of plans and of what was measured on them, each a function that returns a matplotlib Axes.

Every function takes results of this library, and ``ax`` where the figure should go into
one that exists.  matplotlib is loaded when a figure is drawn.
"""

from __future__ import annotations

from qinvert.plot.bits import error_against_bits
from qinvert.plot.candidates import cost_against_sqnr
from qinvert.plot.drift import drift
from qinvert.plot.error_path import error_path, layer_harm
from qinvert.plot.growth import range_growth
from qinvert.plot.heads import head_errors
from qinvert.plot.program import program
from qinvert.plot.values import error_map, value_histogram

__all__ = [
    "cost_against_sqnr",
    "drift",
    "error_against_bits",
    "error_map",
    "error_path",
    "head_errors",
    "layer_harm",
    "program",
    "range_growth",
    "value_histogram",
]
