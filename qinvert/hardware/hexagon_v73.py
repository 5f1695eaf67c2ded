"""Qualcomm Hexagon v73, as Qualcomm's compiler simulates it."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table

HARDWARE = Hardware(
    name="hexagon-v73",
    summary="Qualcomm Hexagon v73 (SA8255)",
    unit="simulated cycles",
    source="Qualcomm QAIRT for SA8255, onnxruntime-qnn 2.7.0, optimization mode 3; not measured",
    date="2026-11-29",
    error=0.119,
    correlation=0.985,
    targets=("hexagon-uint8", "hexagon-int16"),
    tables={
        1: Table(
            whole={
                "ends/KiB": 170.3,
                "product": 1438,
                "product/matrix": 38.39,
                "product/Mmac": 118.5,
                "new right/matrix": 669.6,
                "new right/KiB": 78.08,
                "elementwise": 570.7,
                "elementwise/KiB": 0.6296,
                "move": 1156,
                "move/matrix": 116.3,
                "move/KiB": 72.34,
            },
            chained={
                "new right/matrix": 556.6,
                "new right/KiB": 67.25,
                "elementwise/matrix": 40.59,
                "elementwise/KiB": 47.88,
                "move": 251.7,
                "move/matrix": 248.3,
                "move/KiB": 27.09,
            },
        ),
        2: Table(
            whole={
                "ends/KiB": 192.8,
                "new right/matrix": 1113,
                "new right/KiB": 259.4,
                "elementwise": 3824,
                "elementwise/KiB": 25.97,
                "move/matrix": 1073,
            },
            chained={
                "new right/matrix": 1406,
                "new right/KiB": 166.7,
                "elementwise/KiB": 57.69,
                "move/matrix": 882.4,
            },
        ),
    },
)
