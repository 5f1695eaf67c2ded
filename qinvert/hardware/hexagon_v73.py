"""Qualcomm Hexagon v73, as Qualcomm's compiler simulates it."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table
from qinvert.hardware._qnn import QNN

HARDWARE = Hardware(
    name="hexagon-v73",
    summary="Qualcomm Hexagon v73 (SA8255)",
    unit="simulated cycles",
    source="Qualcomm QAIRT for SA8255, onnxruntime-qnn 2.7.0, optimization mode 3; not measured",
    date="2026-11-29",
    error=0.13,
    correlation=0.988,
    targets=("hexagon-uint8", "hexagon-int16"),
    # onnxruntime-qnn 2.7.0: with signed int16 the compiler leaves products and exponentials of log decays to
    # the CPU, and does not finalize some steps; it takes those of uint16.
    step_targets=("hexagon-uint16",),
    compiler=QNN,
    tables={
        1: Table(
            whole={
                "ends/KiB": 223.1,
                "product": 1927,
                "product/matrix": 25.08,
                "product/Mmac": 91.34,
                "new right/matrix": 694.6,
                "new right/KiB": 64.65,
                "elementwise": 257.8,
                "move": 1153,
                "move/matrix": 119,
                "move/KiB": 75.7,
            },
            chained={
                "product/Mmac": 7.005,
                "new right/matrix": 419.3,
                "new right/KiB": 83.37,
                "elementwise/matrix": 143.4,
                "elementwise/KiB": 27.33,
                "move": 173.2,
                "move/matrix": 225.6,
                "move/KiB": 57.38,
            },
        ),
        2: Table(
            whole={
                "ends/KiB": 251.2,
                "new right/matrix": 1062,
                "new right/KiB": 210.8,
                "elementwise": 3795,
                "elementwise/KiB": 38.28,
                "move/matrix": 1146,
            },
            chained={
                "new right/matrix": 1439,
                "new right/KiB": 147.8,
                "elementwise/KiB": 71.43,
                "move/matrix": 1015,
            },
        ),
    },
    heads_apart=True,
)
