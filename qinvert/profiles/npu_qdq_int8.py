"""QDQ int8, symmetric, static 4-D: the portable form for NPU compilers."""

from __future__ import annotations

from qinvert.formats import INT8
from qinvert.plan.quantization import Requantize
from qinvert.profiles._profile import Profile

PROFILE = Profile(
    name="npu-qdq-int8",
    summary="QuantizeLinear/DequantizeLinear around MatMul, Add, Slice, Concat; int8, zero point 0",
    lowering="qdq",
    quantized_everywhere=True,
    float_state=True,
    exact=False,
    opset=19,
    formats=(INT8,),
    requantize=Requantize.MULTIPLIER,
    operators=frozenset(
        {"QuantizeLinear", "DequantizeLinear", "MatMul", "Add", "Sub", "Mul", "Slice", "Concat"}
        # Chunk steps only; where beta and log decays enter as integers, they get four axes by a Reshape.
        | {"Exp", "Reshape"}
        # Factored plans only.
        | {"Div", "Max"}
        # Factored plans and chunk steps.
        | {"Transpose"}
    ),
    proved=("onnxruntime", "openvino", "qnn", "rknn", "iree", "tvm"),
    hardware="hexagon-v81",
    full_masks=True,
    caveats=(
        "back ends that leave a MatMul in float32 may differ by one step at rounding ties; Hexagon (QNN) has "
        "its own rounding, which is known and simulated, RKNN in sums of two scales; both take L in float16, "
        "and rknn-toolkit2 multiplies symmetric scales by 128/127, see docs/runtimes.md"
    ),
)
