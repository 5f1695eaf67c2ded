"""a CPU, in OpenVINO."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table

HARDWARE = Hardware(
    name="cpu-openvino",
    summary="a CPU, in OpenVINO",
    unit="nanoseconds",
    source="provisional",
    date="2026-11-29",
    error=0.5,
    correlation=0.5,
    targets=("qlinear",),
    tables={1: Table(whole={"product/matrix": 1000, "elementwise": 1000}, chained={})},
)
