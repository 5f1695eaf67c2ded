"""Arm Ethos-U55 with 128 multiply-accumulates a cycle."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table

HARDWARE = Hardware(
    name="ethos-u55-128",
    summary="Arm Ethos-U55 with 128 multiply-accumulates a cycle",
    unit="estimated cycles",
    source="provisional",
    date="2026-11-29",
    error=0.5,
    correlation=0.5,
    targets=("ethos-int8",),
    tables={1: Table(whole={"product/matrix": 1000, "elementwise": 1000}, chained={})},
)
