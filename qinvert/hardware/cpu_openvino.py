"""One thread of a CPU with VNNI, in OpenVINO."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table

HARDWARE = Hardware(
    name="cpu-openvino",
    summary="a CPU with VNNI, one thread of OpenVINO",
    unit="nanoseconds of one thread",
    source="AMD EPYC with AVX512-VNNI, OpenVINO 2026.4.1, least processor time of 15 calls of qlinear",
    date="2026-11-29",
    error=0.14,
    correlation=0.976,
    targets=("qlinear", "npu-qdq-int8"),
    tables={
        1: Table(
            whole={
                "call": 57780,
                "ends/KiB": 143.5,
                "product": 475.3,
                "product/matrix": 168.5,
                "product/Mmac": 5834,
                "new right/KiB": 144.4,
                "elementwise/KiB": 34.32,
                "move": 155.7,
                "move/KiB": 104.2,
            },
            chained={},
        ),
    },
)
