"""QDQ int16 by int8: right operands are split into two int8 planes inside the graph."""

from __future__ import annotations

from qinvert.arithmetic import INT32_LIMIT
from qinvert.formats import INT8, INT16
from qinvert.plan import Requantize
from qinvert.profiles._profile import Lowering, Profile
from qinvert.profiles.npu_qdq_int8 import PROFILE as INT8_PROFILE

PROFILE = Profile(
    name="npu-qdq-int16",
    summary="int16 tensors; products are MatMul s16 x s8, twice, with the right operand split in the graph",
    lowering=Lowering.QDQ,
    opset=21,
    formats=(INT8, INT16),
    requantize=Requantize.DIVIDE,
    operators=INT8_PROFILE.operators,
    proved=("onnxruntime",),
    caveats="onnxruntime multiplies in float32: one step of 1/32767 may differ in up to 2.6 % of the values",
    accumulator_limit=INT32_LIMIT - 1,
)
