"""OpenVINO on the CPU."""

from __future__ import annotations

from qinvert.export.runtimes.subprocesses import separate

RUNTIME = separate(
    "openvino",
    summary="the CPU; int8 products of QDQ graphs with zero point 0, float32 elsewhere",
    module="openvino",
    requirement="openvino",
    # The identity is added before the scale is multiplied.
    reorders=True,
    carries=True,
)
