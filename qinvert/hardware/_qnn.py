"""What Qualcomm's compiler takes: one small graph of every operator was compiled, and run in its emulator.

``benchmarks/compiler_operators.py`` compiles most of them again.  v73 and v81 gave the
same answers, in float32 (which runs as float16) and between uint8 grids.
"""

from __future__ import annotations

from typing import Final

from qinvert.hardware._compiler import Compiler

ELEMENTWISE: Final = frozenset(
    [
        "Abs",
        "Neg",
        "Exp",
        "Log",
        "Sqrt",
        "Sigmoid",
        "Tanh",
        "Relu",
        "Softplus",
        "Floor",
        "Ceil",
        "Round",
        "Sign",
        "Sin",
        "Cos",
        "Reciprocal",
        "HardSwish",
        "HardSigmoid",
        "Elu",
        "Gelu",
        "Mish",
        "Identity",
        "Not",
        "IsNaN",
        "Clip",
        "Cast",
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Max",
        "Min",
        "Pow",
        "Greater",
        "Less",
        "Equal",
        "GreaterOrEqual",
        "LessOrEqual",
        "And",
        "Or",
        "Xor",
        "Where",
    ]
)
PRODUCTS: Final = frozenset(
    ["MatMul", "Gemm", "Conv", "Einsum", "QLinearMatMul", "Attention", "GRU", "com.microsoft.FusedMatMul"]
)
SUMS: Final = frozenset(
    [
        "CumSum",
        "ReduceSum",
        "ReduceMean",
        "ReduceMax",
        "ReduceMin",
        "ReduceL2",
        "ReduceLogSumExp",
        "Softmax",
        "LogSoftmax",
        "LayerNormalization",
        "RMSNormalization",
        "RotaryEmbedding",
        "TopK",
        "ArgMax",
    ]
)
MOVES: Final = frozenset(
    [
        "Concat",
        "Slice",
        "Split",
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Expand",
        "Tile",
        "Pad",
        "Gather",
        "GatherND",
        "GatherElements",
        "ScatterND",
        "ScatterElements",
        "OneHot",
        "Flatten",
        "Constant",
    ]
)
GRIDS: Final = frozenset(
    ["QuantizeLinear", "DequantizeLinear", "com.microsoft.QuantizeLinear", "com.microsoft.DequantizeLinear"]
)

QNN: Final = Compiler(
    name="Qualcomm QNN (onnxruntime-qnn 2.7.0)",
    operators=ELEMENTWISE | PRODUCTS | SUMS | MOVES | GRIDS,
    # AI Hub's converters end here, whatever the operator.
    max_rank=4,
    most_axes=5,
    refused_beyond=frozenset(
        [
            "Neg",
            "Log",
            "Sqrt",
            "Tanh",
            "Softplus",
            "Floor",
            "Ceil",
            "Round",
            "Sign",
            "Sin",
            "Cos",
            "HardSwish",
            "HardSigmoid",
            "Elu",
            "Mish",
            "Max",
            "Min",
            "CumSum",
            "ReduceL2",
            "ReduceLogSumExp",
            "LogSoftmax",
            "LayerNormalization",
        ]
    ),
    floats="float16",
    elements=frozenset(
        [
            "float32",
            "float16",
            "int8",
            "uint8",
            "int16",
            "uint16",
            "int32",
            "int64",
            "uint32",
            "uint64",
            "bool",
            "int4",
            "uint4",
        ]
    ),
    opset=26,
    ir_version=13,
    wrong={
        "CumSum": "multiply by a constant triangular matrix of ones instead",
        "Pad": "join the block with constant zero blocks by Concat",
        "Round": "let QuantizeLinear round",
    },
    rules=frozenset({"concat-order", "shared-constants", "wide-products"}),
)
