"""QDQ with int4 values in int8 containers: a Clip before every QuantizeLinear."""

from __future__ import annotations

from dataclasses import replace

from qinvert.formats import INT4
from qinvert.profiles._profile import Profile
from qinvert.profiles.npu_qdq_int8 import PROFILE as INT8_PROFILE

PROFILE: Profile = replace(
    INT8_PROFILE,
    name="npu-qdq-int4",
    summary="npu-qdq-int8 with values in [-7, 7]: Clip before QuantizeLinear, int8 containers",
    formats=(INT4,),
    proved=("onnxruntime", "openvino", "tvm"),
    operators=INT8_PROFILE.operators | {"Clip"},
    caveats=(
        "no runtime multiplies int4 activations; the Clip keeps products in float in onnxruntime and in QNN, "
        "where values differ; IREE agrees under power-of-two scales only"
    ),
)
