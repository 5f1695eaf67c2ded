"""One NVIDIA H200, by the fused kernels of `qinvert.kernels`."""

from __future__ import annotations

from qinvert.hardware._hardware import Hardware, Table

HARDWARE = Hardware(
    name="gpu",
    summary="NVIDIA H200, fused integer kernels",
    unit="nanoseconds at large batches",
    # Twelve times, none of which was left out of the fit; at C = 128 int8x2 takes 1.7 times as long.
    source="times of fused kernels on one H200, docs/gpu.md; a copy of the matrices is the floor",
    date="2026-11-29",
    error=0.05,
    correlation=0.99,
    targets=("int-ops",),
    tables={
        1: Table(whole={"product/Mmac": 48.9}, chained={}),
        2: Table(whole={"product/Mmac": 37.2}, chained={}),
    },
)
