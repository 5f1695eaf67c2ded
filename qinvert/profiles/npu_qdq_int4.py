"""QDQ with int4 values in int8 containers: a Clip after every operator."""

from __future__ import annotations

from dataclasses import replace

from qinvert.formats import INT4
from qinvert.profiles._profile import Profile
from qinvert.profiles.npu_qdq_int8 import PROFILE as INT8_PROFILE

PROFILE: Profile = replace(
    INT8_PROFILE,
    name="npu-qdq-int4",
    summary="npu-qdq-int8 with values in [-7, 7]: int8 containers, a Clip after every operator",
    formats=(INT4,),
    proved=("onnxruntime", "openvino", "qnn", "rknn", "iree", "tvm"),
    operators=INT8_PROFILE.operators | {"Clip"},
    caveats=(
        "no runtime multiplies int4 activations, so products are int8; where 1.0 lies on no grid at little "
        "cost (entries much larger than 1), QNN multiplies in float32 and RKNN in float16"
    ),
)
