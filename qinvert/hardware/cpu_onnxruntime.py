"""One thread of a CPU with VNNI, in onnxruntime."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table

HARDWARE = Hardware(
    name="cpu-onnxruntime",
    summary="a CPU with VNNI, one thread of onnxruntime",
    unit="nanoseconds of one thread",
    source="AMD EPYC with AVX512-VNNI, onnxruntime 1.31.1, least processor time of 15 calls of qlinear-uint8",
    date="2026-11-29",
    error=0.187,
    correlation=0.97,
    targets=("qlinear-uint8", "npu-qdq-uint8"),
    tables={
        1: Table(
            whole={
                "call": 9576,
                "ends/KiB": 629.8,
                "product/Mmac": 20370,
                "elementwise": 1094,
                "elementwise/matrix": 143.4,
                "elementwise/KiB": 56.9,
                "move": 726.6,
                "move/matrix": 0.9083,
            },
            chained={},
        ),
    },
)
