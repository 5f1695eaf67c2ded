"""Arm Ethos-U85 with 256 multiply-accumulates a cycle, as Vela estimates it."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table
from qinvert.hardware._vela import vela

HARDWARE = Hardware(
    name="ethos-u85-256",
    summary="Arm Ethos-U85, 256 multiply-accumulates a cycle",
    unit="estimated cycles",
    source="Arm Vela 5.2.0, Ethos_U85_SYS_DRAM_Mid; not measured, compare within this chip only",
    date="2026-11-29",
    error=0.158,
    correlation=0.965,
    targets=("ethos-int8", "npu-qdq-int16"),
    compiler=vela("int16", "uint16"),
    tables={
        1: Table(
            whole={
                "call": 473.9,
                "ends/KiB": 272.4,
                "product/matrix": 55.97,
                "product/Mmac": 12860,
                "new right/KiB": 1654,
                "elementwise/KiB": 108.9,
                "move": 422.2,
                "move/matrix": 61.72,
                "move/KiB": 94.46,
            },
            chained={},
        ),
    },
)
