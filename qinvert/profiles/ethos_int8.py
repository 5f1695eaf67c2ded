"""QDQ int8 for Arm's Ethos-U NPUs, which take TFLite files of integer operators only."""

from __future__ import annotations

from dataclasses import replace

from qinvert.profiles._profile import Profile
from qinvert.profiles.npu_qdq_int8 import PROFILE as INT8_PROFILE

PROFILE: Profile = replace(
    INT8_PROFILE,
    float_state=False,
    name="ethos-int8",
    summary="npu-qdq-int8 for Arm Ethos-U: verify writes it as a TFLite file, which Vela compiles",
    proved=("onnxruntime", "vela"),
    hardware="ethos-u85-256",
    caveats=(
        "TFLite's kernels and the NPU round every result twice, which is known and simulated; floats become "
        "integers on the host; no sum may be 2^19 times finer than its terms; Vela estimates cycles for its "
        "own decisions"
    ),
)
