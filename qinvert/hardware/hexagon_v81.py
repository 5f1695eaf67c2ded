"""Qualcomm Hexagon v81, as Qualcomm's compiler simulates it."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table

HARDWARE = Hardware(
    name="hexagon-v81",
    summary="Qualcomm Hexagon v81 (SA8797)",
    unit="simulated cycles",
    source="Qualcomm QAIRT for SA8797, onnxruntime-qnn 2.7.0, optimization mode 3; not measured",
    date="2026-11-29",
    error=0.185,
    correlation=0.981,
    targets=("hexagon-uint8", "hexagon-int16"),
    tables={
        1: Table(
            whole={
                "call": 2690,
                "ends/KiB": 59.29,
                "product": 1475,
                "product/matrix": 200.3,
                "product/Mmac": 229.8,
                "new right/matrix": 179.3,
                "elementwise": 611,
                "move": 529.2,
                "move/matrix": 51.72,
                "move/KiB": 33.8,
            },
            chained={
                "call": 5216,
                "product/matrix": 97.63,
                "product/Mmac": 98.82,
                "new right/matrix": 114.4,
                "new right/KiB": 18.59,
                "elementwise/matrix": 99.29,
                "elementwise/KiB": 7.001,
                "move": 55.62,
                "move/matrix": 76.17,
                "move/KiB": 7.047,
            },
        ),
        2: Table(
            whole={
                "ends/KiB": 91.02,
                "product/matrix": 62.2,
                "product/Mmac": 116.8,
                "new right/matrix": 115.4,
                "elementwise": 2014,
                "elementwise/matrix": 47.34,
                "elementwise/KiB": 16.54,
                "move": 811.5,
                "move/matrix": 411.6,
                "move/KiB": 41.31,
            },
            chained={
                "product/Mmac": 52.78,
                "new right/matrix": 334,
                "elementwise/matrix": 11.52,
                "elementwise/KiB": 26.25,
                "move": 67.35,
                "move/matrix": 328.4,
                "move/KiB": 11.32,
            },
        ),
    },
)
