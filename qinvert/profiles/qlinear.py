"""QLinearMatMul s8 x s8 -> s8: products stay int8, residual terms join inside them."""

from __future__ import annotations

from dataclasses import replace

from qinvert.formats import INT8
from qinvert.plan import Requantize
from qinvert.profiles._profile import Lowering, Profile
from qinvert.profiles.int_ops import PROFILE as INT_OPS

PROFILE: Profile = replace(
    INT_OPS,
    name="qlinear",
    summary="QLinearMatMul s8 x s8 -> s8 with residual terms inside the product; sums as in int-ops",
    lowering=Lowering.QLINEAR,
    formats=(INT8,),
    requantize=Requantize.MULTIPLIER,
    operators=INT_OPS.operators | {"QLinearMatMul"},
    caveats=(
        "plans in the divide form keep MatMulInteger for their products, which no NPU compiler takes; "
        "s8 x s8 is slow on x86 in onnxruntime"
    ),
)
