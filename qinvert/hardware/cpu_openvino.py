"""One thread of a CPU with VNNI, in OpenVINO."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table

HARDWARE = Hardware(
    name="cpu-openvino",
    summary="a CPU with VNNI, one thread of OpenVINO",
    unit="nanoseconds of one thread",
    source="AMD EPYC with AVX512-VNNI, OpenVINO 2026.4.1, least processor time of 15 calls of qlinear",
    date="2026-11-29",
    error=0.141,
    correlation=0.976,
    targets=("qlinear", "npu-qdq-int8"),
    tables={
        1: Table(
            whole={
                "call": 56990,
                "ends/KiB": 153.4,
                "product": 608.8,
                "product/matrix": 169.6,
                "product/Mmac": 5848,
                "new right/KiB": 85.88,
                "elementwise/KiB": 64.2,
                "move": 146.2,
                "move/KiB": 108.5,
            },
            chained={},
        ),
    },
)
