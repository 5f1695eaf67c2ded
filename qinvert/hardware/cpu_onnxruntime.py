"""a CPU, in onnxruntime."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table

HARDWARE = Hardware(
    name="cpu-onnxruntime",
    summary="a CPU, in onnxruntime",
    unit="nanoseconds",
    source="provisional",
    date="2026-11-29",
    error=0.5,
    correlation=0.5,
    targets=("qlinear-uint8",),
    tables={1: Table(whole={"product/matrix": 1000, "elementwise": 1000}, chained={})},
)
