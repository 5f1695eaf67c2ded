"""Arm Ethos-U NPUs: compiled by Vela, run in TFLite's reference kernels.

The NPU computes what these kernels do.  They round twice, where ONNX rounds
once: to a whole number of the accumulator times a factor in [1/2, 1), then to
the result, both times halves away from zero.
"""

from __future__ import annotations

from qinvert.export.runtimes.subprocesses import separate

#: Steps by which values differ from ONNX's, see `docs/limits.md`.
OWN_STEPS = 2

RUNTIME = separate(
    "vela",
    summary="Arm Ethos-U85 and U55: compiled by Vela, and TFLite's reference kernels; floats stay outside",
    module="ethosu",
    requirement="ethos-u-vela ai-edge-litert onnx",
    own_steps=OWN_STEPS,
    hardware={
        "ethos-u85-256": "Ethos-U85 of 256 MACs, DRAM",
        "ethos-u55-128": "Ethos-U55 of 128 MACs, shared SRAM",
    },
    loading=(
        "TensorFlow Lite with Arm's Ethos-U driver loads it; it takes and returns integers, so that the host "
        "quantizes what goes in and dequantizes what comes out"
    ),
)
