"""Arm Ethos-U55 with 128 multiply-accumulates a cycle, as Vela estimates it."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table
from qinvert.hardware._vela import vela

HARDWARE = Hardware(
    name="ethos-u55-128",
    summary="Arm Ethos-U55, 128 multiply-accumulates a cycle",
    unit="estimated cycles",
    source="Arm Vela 5.2.0, Ethos_U55_High_End_Embedded; not measured, compare within this chip only",
    date="2026-11-29",
    error=0.067,
    correlation=1,
    targets=("ethos-int8",),
    compiler=vela(),
    tables={
        1: Table(
            whole={
                "call": 3730,
                "product/matrix": 39.96,
                "product/Mmac": 900800,
                "new right/KiB": 1876,
                "elementwise/KiB": 2297,
                "move": 319.2,
                "move/matrix": 35.95,
                "move/KiB": 242.3,
            },
            chained={},
        ),
    },
)
