"""QDQ int8 at opset 17 with power-of-two scales: the XINT8 form of Ryzen AI."""

from __future__ import annotations

from dataclasses import replace

from qinvert.profiles._profile import Profile
from qinvert.profiles.npu_qdq_int8 import PROFILE as INT8_PROFILE

PROFILE: Profile = replace(
    INT8_PROFILE,
    float_state=False,
    name="ryzen-xint8",
    summary="npu-qdq-int8 at opset 17, every scale a power of two (XINT8)",
    opset=17,
    caveats="the NPU's own compiler is not public: checked in other runtimes only",
    power_of_two_scales=True,
    hardware="",
)
