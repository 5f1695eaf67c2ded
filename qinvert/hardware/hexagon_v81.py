"""Qualcomm Hexagon v81, as Qualcomm's compiler simulates it."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table
from qinvert.hardware._qnn import QNN

HARDWARE = Hardware(
    name="hexagon-v81",
    summary="Qualcomm Hexagon v81 (SA8797)",
    unit="simulated cycles",
    source="Qualcomm QAIRT for SA8797, onnxruntime-qnn 2.7.0, optimization mode 3; not measured",
    date="2026-11-29",
    error=0.189,
    correlation=0.986,
    targets=("hexagon-uint8", "hexagon-int16"),
    # onnxruntime-qnn 2.7.0: with signed int16 the compiler leaves products and exponentials of log decays to
    # the CPU, and does not finalize some steps; it takes those of uint16.
    step_targets=("hexagon-uint16",),
    compiler=QNN,
    tables={
        1: Table(
            whole={
                "call": 6185,
                "ends/KiB": 76.58,
                "product": 797.3,
                "product/matrix": 169.6,
                "product/Mmac": 155.3,
                "new right/matrix": 186.6,
                "new right/KiB": 6.512,
                "elementwise": 785.1,
                "elementwise/matrix": 10.55,
                "move": 548.2,
                "move/matrix": 53.67,
                "move/KiB": 43.94,
            },
            chained={
                "call": 3172,
                "product/matrix": 97.67,
                "product/Mmac": 130.5,
                "new right/matrix": 81.7,
                "new right/KiB": 7.841,
                "elementwise/matrix": 130.3,
                "elementwise/KiB": 5.184,
                "move/matrix": 99.66,
                "move/KiB": 25.31,
            },
        ),
        2: Table(
            whole={
                "ends/KiB": 104.5,
                "product/Mmac": 97.41,
                "new right/matrix": 314.7,
                "new right/KiB": 5.721,
                "elementwise": 2101,
                "elementwise/KiB": 17.36,
                "move": 722.4,
                "move/matrix": 409.8,
                "move/KiB": 55.75,
            },
            chained={
                "product/matrix": 19.05,
                "product/Mmac": 78.72,
                "new right/matrix": 365.3,
                "elementwise/matrix": 38.67,
                "elementwise/KiB": 19.44,
                "move/matrix": 334.5,
                "move/KiB": 19.13,
            },
        ),
    },
    heads_apart=True,
)
