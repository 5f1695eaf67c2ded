"""What reaches Arm's compiler: the operators that `qinvert.export.runtimes` writes as TFLite, on integers."""

from __future__ import annotations

from typing import Final

from qinvert.hardware._compiler import Compiler

#: Operators on integers.
OPERATORS: Final = frozenset(
    [
        "MatMul",
        "Add",
        "Sub",
        "Mul",
        "Concat",
        "Slice",
        "Transpose",
        "Reshape",
        "Clip",
        "Constant",
        "QuantizeLinear",
        "DequantizeLinear",
    ]
)


def vela(*wide: str) -> Compiler:
    """Return the compiler of a chip that also takes integers of the ``wide`` types."""
    return Compiler(
        name="Arm Vela 5.2.0, through TFLite",
        operators=OPERATORS,
        max_rank=4,
        most_axes=4,
        refused_beyond=frozenset(),
        floats="",
        elements=frozenset({"float32", "int8", "uint8", "int32", "int64", *wide}),
        opset=25,
        ir_version=13,
    )
