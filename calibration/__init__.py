"""From data to plans: sources, capture, observers, planner, evaluation."""

from __future__ import annotations

if __name__ != "qinvert.calibration":
    raise ImportError("this folder is the package qinvert.calibration; write `import qinvert.calibration`")
