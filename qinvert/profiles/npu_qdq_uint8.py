"""QDQ uint8 with zero point 128: the real values of `npu-qdq-int8`."""

from __future__ import annotations

from dataclasses import replace

from qinvert.formats import UINT8
from qinvert.profiles._profile import Profile
from qinvert.profiles.npu_qdq_int8 import PROFILE as INT8_PROFILE

PROFILE: Profile = replace(
    INT8_PROFILE,
    name="npu-qdq-uint8",
    summary="npu-qdq-int8 stored as uint8 with zero point 128; onnxruntime fuses it without options",
    proved=("onnxruntime", "openvino", "qnn", "rknn", "iree", "tvm"),
    caveats="OpenVINO multiplies uint8 with a zero point in float; otherwise as npu-qdq-int8",
    storage=UINT8,
)
