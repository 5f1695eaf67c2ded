"""MatMulInteger on int8: the literal integer program, bit-exact everywhere."""

from __future__ import annotations

from typing import Final

from qinvert.formats import INT4, INT8, INT8X2
from qinvert.plan.quantization import Requantize
from qinvert.profiles._profile import Profile

#: A caveat of every profile of these operators.
ON_OPENVINO: Final = "OpenVINO multiplies in float32, and int8x2 is proved there for scales='pow2' only"

PROFILE = Profile(
    name="int-ops",
    summary="MatMulInteger s8 x s8, then Cast, Mul, Add, QuantizeLinear; data movement on int8",
    lowering="integer",
    quantized_everywhere=False,
    float_state=True,
    exact=True,
    opset=19,
    formats=(INT8, INT4, INT8X2),
    requantize=Requantize.DIVIDE,
    operators=frozenset(
        {
            "QuantizeLinear",
            "DequantizeLinear",
            "MatMulInteger",
            "Cast",
            "Mul",
            "Add",
            "Sub",
            "Slice",
            "Concat",
            "Clip",
            "BitwiseAnd",
            # Factored plans only.
            "Div",
            "Max",
            # Factored plans and chunk steps.
            "Transpose",
            # Chunk steps only.
            "Exp",
        }
    ),
    proved=("onnxruntime", "openvino", "iree", "tvm"),
    caveats=(
        f"no NPU compiler takes MatMulInteger (QNN and RKNN refuse it); {ON_OPENVINO}; "
        "s8 x s8 is slow on x86 in onnxruntime"
    ),
)
