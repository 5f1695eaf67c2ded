"""QLinearMatMul u8 x u8 -> u8 with masks by Where and identities by Max: for CPUs in onnxruntime."""

from __future__ import annotations

from dataclasses import replace

from qinvert.formats import UINT8
from qinvert.profiles._profile import Profile
from qinvert.profiles.qlinear import PROFILE as QLINEAR

PROFILE: Profile = replace(
    QLINEAR,
    name="qlinear-uint8",
    summary="qlinear stored as uint8 with zero point 128, with Where and Max for masks: onnxruntime on CPUs",
    lowering="qlinear_uint8",
    operators=QLINEAR.operators | {"Max", "Min", "Where"},
    proved=("onnxruntime",),
    caveats=(
        "for onnxruntime on CPUs: OpenVINO multiplies uint8 with a zero point in float, where qlinear is "
        "faster; sums are as in qlinear"
    ),
    storage=UINT8,
)
