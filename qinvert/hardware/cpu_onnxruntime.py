"""One thread of a CPU with VNNI, in onnxruntime."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table

HARDWARE = Hardware(
    name="cpu-onnxruntime",
    summary="a CPU with VNNI, one thread of onnxruntime",
    unit="nanoseconds of one thread",
    source="AMD EPYC with AVX512-VNNI, onnxruntime 1.31.1, least processor time of 15 calls of qlinear-uint8",
    date="2026-11-29",
    error=0.182,
    correlation=0.97,
    targets=("qlinear-uint8", "npu-qdq-uint8"),
    tables={
        1: Table(
            whole={
                "call": 9387,
                "ends/KiB": 646.3,
                "product/Mmac": 20010,
                "elementwise": 1180,
                "elementwise/matrix": 133.7,
                "elementwise/KiB": 77.31,
                "move": 749.1,
                "move/matrix": 5.101,
            },
            chained={},
        ),
    },
)
