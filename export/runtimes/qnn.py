"""Qualcomm QNN through onnxruntime's plugin: compiled for Hexagon, run in the x86 emulator."""

from __future__ import annotations

from qinvert.export.runtimes.subprocesses import separate
from qinvert.numerics.law import Rounding

#: For cases in which the processor's rounding is not known: sums in float16, and int16.
OWN_STEPS = 2

RUNTIME = separate(
    "qnn",
    summary="Hexagon v73, v75, v79 and v81: context binary without CPU fallback, and its emulator",
    module="onnxruntime_qnn",
    requirement="onnxruntime onnxruntime-qnn onnx",
    own_steps=OWN_STEPS,
    # Float tensors of the graph are float16 on Hexagon.
    inputs="float16",
    carries=True,
    rounding=Rounding.HEXAGON,
    # Chips whose cycles the compiler simulates, one of each architecture; those of phones are none.
    hardware={"hexagon-v81": "SA8797, Hexagon v81", "hexagon-v73": "SA8255, Hexagon v73"},
    loading=(
        "onnxruntime-qnn loads it in place of the graph on a device of that architecture; its attribute "
        "ep_cache_context is the QNN context binary itself"
    ),
)
