"""QDQ int16 by int8: right operands are split into two int8 planes inside the graph."""

from __future__ import annotations

from qinvert.formats import INT8, INT16
from qinvert.numerics.accumulators import INT32_LIMIT
from qinvert.plan.quantization import Requantize
from qinvert.profiles._profile import Profile
from qinvert.profiles.npu_qdq_int8 import PROFILE as INT8_PROFILE

PROFILE = Profile(
    name="npu-qdq-int16",
    summary="int16 tensors; two MatMul int16 x int8 per product, each rounded to int16",
    lowering="qdq",
    quantized_everywhere=True,
    float_state=True,
    exact=False,
    opset=21,
    formats=(INT8, INT16),
    requantize=Requantize.MULTIPLIER,
    operators=INT8_PROFILE.operators,
    proved=("onnxruntime", "qnn", "iree", "tvm"),
    caveats=(
        "onnxruntime multiplies in float32: where it sums 2^24 steps or more, or scales are no powers of "
        "two, rare values differ, by steps that verify bounds one by one; Hexagon cuts 8 bits off its "
        "accumulators"
    ),
    accumulator_limit=INT32_LIMIT - 1,
)
