"""Arm Ethos-U NPUs: compiled by Vela, run in TFLite's reference kernels.

Arm compares its NPUs with these kernels bit for bit.  They round every result
twice, where ONNX rounds once; see `qinvert.numerics.tflite`.
"""

from __future__ import annotations

from qinvert.export.runtimes.subprocesses import separate
from qinvert.numerics.law import Rounding

#: For plans whose rounding is not simulated: int16.
OWN_STEPS = 2

RUNTIME = separate(
    "vela",
    summary="Arm Ethos-U85 and U55: compiled by Vela, and TFLite's reference kernels; floats stay outside",
    module="ethosu",
    requirement="ethos-u-vela ai-edge-litert onnx",
    own_steps=OWN_STEPS,
    rounding=Rounding.TFLITE,
    hardware={
        "ethos-u85-256": "Ethos-U85 of 256 MACs, DRAM",
        "ethos-u55-128": "Ethos-U55 of 128 MACs, shared SRAM",
    },
    loading=(
        "TensorFlow Lite with Arm's Ethos-U driver loads it; it takes and returns integers, so that the host "
        "quantizes what goes in and dequantizes what comes out"
    ),
)
