"""Qualcomm Hexagon v81, as Qualcomm's compiler simulates it."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table

HARDWARE = Hardware(
    name="hexagon-v81",
    summary="Qualcomm Hexagon v81 (SA8797)",
    unit="simulated cycles",
    source="Qualcomm QAIRT for SA8797, onnxruntime-qnn 2.7.0, optimization mode 3; not measured",
    date="2026-11-29",
    error=0.17,
    correlation=0.967,
    targets=("hexagon-uint8", "hexagon-int16"),
    tables={
        1: Table(
            whole={
                "call": 573.1,
                "ends/KiB": 40.32,
                "product": 3023,
                "product/matrix": 399.8,
                "product/Mmac": 345.3,
                "move": 418.1,
                "move/matrix": 47.58,
                "move/KiB": 5.334,
            },
            chained={
                "call": 3042,
                "product/matrix": 274.1,
                "product/Mmac": 80.83,
                "elementwise/matrix": 80.33,
                "elementwise/KiB": 21.21,
                "move": 38.44,
                "move/matrix": 60.33,
                "move/KiB": 2.864,
            },
        ),
        2: Table(
            whole={
                "call": 145.4,
                "ends/KiB": 71.78,
                "product/matrix": 219.1,
                "product/Mmac": 116.3,
                "elementwise": 1777,
                "elementwise/matrix": 50.79,
                "elementwise/KiB": 15.76,
                "move": 790.7,
                "move/matrix": 415.3,
                "move/KiB": 41.01,
            },
            chained={
                "product/matrix": 82.65,
                "product/Mmac": 63.93,
                "elementwise/matrix": 150.4,
                "elementwise/KiB": 21.27,
                "move": 104.7,
                "move/matrix": 344,
                "move/KiB": 14.41,
            },
        ),
    },
)
