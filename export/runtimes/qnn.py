"""Qualcomm QNN through onnxruntime's plugin: compiled for Hexagon, run in the x86 emulator."""

from __future__ import annotations

from qinvert.export.runtimes.subprocesses import separate

#: The processor's own rounding: measured on blocks of 12 products, 1 to 2 steps.
OWN_STEPS = 2

RUNTIME = separate(
    "qnn",
    summary="Hexagon v73, v75 and v79: context binary without CPU fallback, and its emulator",
    module="onnxruntime_qnn",
    requirement="onnxruntime onnxruntime-qnn onnx",
    own_steps=OWN_STEPS,
)
