"""Qualcomm Hexagon v73, as Qualcomm's compiler simulates it."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table

HARDWARE = Hardware(
    name="hexagon-v73",
    summary="Qualcomm Hexagon v73 (SA8255)",
    unit="simulated cycles",
    source="Qualcomm QAIRT for SA8255, onnxruntime-qnn 2.7.0, optimization mode 3; not measured",
    date="2026-11-29",
    error=0.222,
    correlation=0.945,
    targets=("hexagon-uint8", "hexagon-int16"),
    tables={
        1: Table(
            whole={
                "ends/KiB": 117.1,
                "product": 1412,
                "product/matrix": 766.6,
                "product/Mmac": 519.6,
                "elementwise": 661.3,
                "elementwise/matrix": 1.797,
                "elementwise/KiB": 21.76,
                "move": 1013,
                "move/matrix": 103.2,
                "move/KiB": 102,
            },
            chained={
                "product/matrix": 265.1,
                "product/Mmac": 282.5,
                "elementwise/matrix": 180.9,
                "elementwise/KiB": 78.53,
                "move": 318.8,
                "move/matrix": 290.3,
            },
        ),
        2: Table(
            whole={
                "ends/KiB": 95.13,
                "product/matrix": 1048,
                "product/Mmac": 147.9,
                "elementwise": 3625,
                "elementwise/KiB": 151.8,
                "move": 65.82,
                "move/matrix": 1078,
                "move/KiB": 157.4,
            },
            chained={
                "product/matrix": 92.89,
                "product/Mmac": 274.7,
                "elementwise/matrix": 685.1,
                "elementwise/KiB": 104.1,
                "move/matrix": 1113,
            },
        ),
    },
)
