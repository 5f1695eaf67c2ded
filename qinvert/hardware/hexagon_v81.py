"""Qualcomm Hexagon v81, as Qualcomm's compiler simulates it."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table

HARDWARE = Hardware(
    name="hexagon-v81",
    summary="Qualcomm Hexagon v81 (SA8797)",
    unit="simulated cycles",
    source="Qualcomm QAIRT for SA8797, onnxruntime-qnn 2.7.0, optimization mode 3; not measured",
    date="2026-11-29",
    error=0.188,
    correlation=0.982,
    targets=("hexagon-uint8", "hexagon-int16"),
    tables={
        1: Table(
            whole={
                "call": 2757,
                "ends/KiB": 60.06,
                "product": 1339,
                "product/matrix": 192.7,
                "product/Mmac": 228.8,
                "new right/matrix": 181.8,
                "elementwise": 685.2,
                "elementwise/matrix": 1.634,
                "move": 528.2,
                "move/matrix": 52.79,
                "move/KiB": 34.68,
            },
            chained={
                "call": 5222,
                "product/matrix": 93.05,
                "product/Mmac": 98.72,
                "new right/matrix": 109.2,
                "new right/KiB": 19.04,
                "elementwise/matrix": 104,
                "elementwise/KiB": 6.84,
                "move": 55.57,
                "move/matrix": 77.58,
                "move/KiB": 7.071,
            },
        ),
        2: Table(
            whole={
                "ends/KiB": 84.11,
                "product/matrix": 51.14,
                "product/Mmac": 146.5,
                "new right/matrix": 265.9,
                "elementwise": 2013,
                "elementwise/KiB": 14.11,
                "move": 722.5,
                "move/matrix": 383,
                "move/KiB": 48.61,
            },
            chained={
                "product/Mmac": 50.89,
                "new right/matrix": 368.3,
                "elementwise/KiB": 28.74,
                "move": 83.6,
                "move/matrix": 324.1,
            },
        ),
    },
)
