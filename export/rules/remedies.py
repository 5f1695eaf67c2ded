"""What to do about an operator that a compiler does not take, one sentence each."""

from __future__ import annotations

from typing import Final

from qinvert.hardware import Compiler

#: Remedies by operators, those of one remedy together.
_FAMILIES: Final = {
    "Scan Loop If": (
        "replace the layer's loop by its chunk step, which has none: qinvert calibrate --scope chunk, then "
        "qinvert export"
    ),
    "Trilu EyeLike": "multiply by a constant mask of ones and zeros instead",
    "Range ConstantOfShape Shape Size": "fix every shape: then it is computed before the graph is compiled",
    "NonZero Unique Compress NonMaxSuppression": (
        "keep a static shape, and multiply what is left out by a mask of zeros"
    ),
    "MatMulInteger ConvInteger DynamicQuantizeLinear QLinearMatMul QLinearConv": (
        "write it as MatMul between DequantizeLinear and QuantizeLinear: export with a QDQ profile"
    ),
    "LinearAttention com.microsoft.LinearAttention com.microsoft.GatedDeltaNet": (
        "replace it by chunks with integer inverses: qinvert graft"
    ),
    "Erf": "write the whole activation as Gelu, from operator set 20 on",
    "CumSum": "multiply by a constant triangular matrix of ones instead",
    "ScatterND ScatterElements Pad": "join blocks by Concat instead",
    "Where": "multiply by a mask of ones and zeros instead",
    "Mod BitwiseXor BitwiseAnd BitwiseOr BitShift": "compute it before the graph runs, on the host",
}
_REMEDIES: Final = {name: remedy for names, remedy in _FAMILIES.items() for name in names.split()}


def remedy_of(operator: str, compiler: Compiler) -> str:
    """Return what to do about an operator that is missing."""
    if operator in _REMEDIES:
        return _REMEDIES[operator]
    plain = operator.rpartition(".")[2]
    if plain != operator and plain in compiler.operators:
        return f"export it with ONNX's own operator {plain}"
    return "rewrite it with operators that the compiler takes, or run it on the host"
