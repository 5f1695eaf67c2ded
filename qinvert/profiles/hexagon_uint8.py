"""QDQ uint8 as Qualcomm's compiler for Hexagon takes the fewest cycles for."""

from __future__ import annotations

from dataclasses import replace

from qinvert.profiles._profile import Profile
from qinvert.profiles.npu_qdq_uint8 import PROFILE as UINT8_PROFILE

PROFILE: Profile = replace(
    UINT8_PROFILE,
    float_state=False,
    name="hexagon-uint8",
    summary="npu-qdq-uint8 for Hexagon: masks written out for every matrix; unsigned ends cost no conversion",
    proved=("onnxruntime", "qnn"),
    caveats="as npu-qdq-uint8; the file holds every mask once for each matrix of the batch",
    session_options=("htp_graph_finalization_optimization_mode=3",),
)
