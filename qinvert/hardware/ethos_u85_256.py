"""Arm Ethos-U85 with 256 multiply-accumulates a cycle, as Vela estimates it."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table

HARDWARE = Hardware(
    name="ethos-u85-256",
    summary="Arm Ethos-U85, 256 multiply-accumulates a cycle",
    unit="estimated cycles",
    source="Arm Vela 5.2.0, Ethos_U85_SYS_DRAM_Mid; not measured, compare within this chip only",
    date="2026-11-29",
    error=0.149,
    correlation=0.965,
    targets=("ethos-int8", "npu-qdq-int16"),
    tables={
        1: Table(
            whole={
                "call": 614.4,
                "ends/KiB": 209.1,
                "product/matrix": 83.12,
                "product/Mmac": 13390,
                "new right/KiB": 821.7,
                "elementwise/KiB": 496.5,
                "move": 403.8,
                "move/matrix": 53.03,
                "move/KiB": 243.4,
            },
            chained={},
        ),
    },
)
