"""QLinearMatMul s8 x s8 -> s8: products stay int8, residual terms join inside them."""

from __future__ import annotations

from dataclasses import replace

from qinvert.formats import INT8
from qinvert.plan.quantization import Requantize
from qinvert.profiles._profile import Profile
from qinvert.profiles.int_ops import PROFILE as INT_OPS

PROFILE: Profile = replace(
    INT_OPS,
    name="qlinear",
    summary="QLinearMatMul s8 x s8 -> s8 with residual terms inside the product; sums as in int-ops",
    lowering="qlinear",
    formats=(INT8,),
    proved=("onnxruntime", "openvino"),
    requantize=Requantize.MULTIPLIER,
    operators=INT_OPS.operators | {"QLinearMatMul"},
    caveats=(
        "sums stay Cast, Mul, Add, QuantizeLinear, and plans in the divide form keep MatMulInteger: NPU "
        "compilers leave those to the CPU or refuse them (QNN, RKNN); IREE and TVM refuse QLinearMatMul; "
        "s8 x s8 is slow on x86 in onnxruntime"
    ),
)
