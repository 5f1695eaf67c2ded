"""Qualcomm Hexagon v73, as Qualcomm's compiler simulates it."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table

HARDWARE = Hardware(
    name="hexagon-v73",
    summary="Qualcomm Hexagon v73",
    unit="simulated cycles",
    source="provisional",
    date="2026-11-29",
    error=0.12,
    correlation=0.99,
    targets=("hexagon-uint8", "hexagon-int16"),
    tables={
        1: Table(
            whole={
                "call": 8500,
                "product/matrix": 312,
                "elementwise": 927,
                "elementwise/KiB": 29.7,
                "move": 1500,
                "move/KiB": 69,
            },
            chained={
                "call": 8500,
                "product/matrix": 200,
                "elementwise": 60,
                "elementwise/KiB": 15,
                "move": 150,
                "move/KiB": 69,
            },
        )
    },
)
