"""Qualcomm Hexagon v73, as Qualcomm's compiler simulates it."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table

HARDWARE = Hardware(
    name="hexagon-v73",
    summary="Qualcomm Hexagon v73 (SA8255)",
    unit="simulated cycles",
    source="Qualcomm QAIRT for SA8255, onnxruntime-qnn 2.7.0, optimization mode 3; not measured",
    date="2026-11-29",
    error=0.118,
    correlation=0.985,
    targets=("hexagon-uint8", "hexagon-int16"),
    tables={
        1: Table(
            whole={
                "ends/KiB": 172.3,
                "product": 1538,
                "product/matrix": 22.94,
                "product/Mmac": 99.83,
                "new right/matrix": 685.6,
                "new right/KiB": 76.42,
                "elementwise": 509.5,
                "elementwise/KiB": 2.659,
                "move": 1160,
                "move/matrix": 115.7,
                "move/KiB": 72.72,
            },
            chained={
                "new right/matrix": 562.6,
                "new right/KiB": 66.89,
                "elementwise/matrix": 37.74,
                "elementwise/KiB": 48.03,
                "move": 251.6,
                "move/matrix": 248.1,
                "move/KiB": 27.15,
            },
        ),
        2: Table(
            whole={
                "ends/KiB": 200.1,
                "new right/matrix": 1048,
                "new right/KiB": 246,
                "elementwise": 3850,
                "elementwise/KiB": 31.33,
                "move/matrix": 1084,
                "move/KiB": 32.32,
            },
            chained={
                "product/Mmac": 22.36,
                "new right/matrix": 1382,
                "new right/KiB": 169,
                "elementwise/KiB": 53.4,
                "move/matrix": 904.8,
            },
        ),
    },
)
