"""Which operators a chip's compiler takes: one graph of each, compiled, beside what `qinvert.doctor` says.

It is where the tables of ``qinvert/hardware`` about compilers come from.  A line
that ends with ``differs`` shows what has changed since they were written.

    python benchmarks/compiler_operators.py hexagon-v81
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import qinvert
from qinvert.errors import ExportError
from qinvert.export.rules.compiler_faults import Effect
from qinvert.export.runtimes import estimates

UNARY = (
    "Abs Neg Exp Log Sqrt Sigmoid Tanh Relu Softplus Erf Floor Ceil Round Sign Sin Cos Reciprocal HardSwish "
    "HardSigmoid Elu Gelu Softsign Mish Softmax LogSoftmax Trilu"
)
BINARY = "Add Sub Mul Div Max Min Pow MatMul"
COMPARISONS = "Greater Less Equal GreaterOrEqual LessOrEqual"
REDUCTIONS = "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL2 ReduceSumSquare ReduceLogSumExp"
#: Sizes of tensors by their number of axes.
SHAPES = {4: (1, 2, 8, 8), 5: (1, 2, 3, 8, 8), 6: (1, 1, 2, 3, 8, 8)}
FLOAT, BOOL = TensorProto.FLOAT, TensorProto.BOOL


def cases() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Yield every graph with its name."""
    for axes, shape in SHAPES.items():
        for operator in UNARY.split():
            yield f"{operator}, {axes} axes", model(operator, [shape], shape)
        for operator in BINARY.split():
            yield f"{operator}, {axes} axes", model(operator, [shape, shape], shape)
        for operator in REDUCTIONS.split():
            last = {"axes": np.array([axes - 1])}
            yield f"{operator}, {axes} axes", model(operator, [shape], (*shape[:-1], 1), constants=last)
        for operator in COMPARISONS.split():
            yield f"{operator}, {axes} axes", model(operator, [shape, shape], shape, BOOL)
        last = {"axis": np.array(axes - 1)}
        yield f"CumSum, {axes} axes", model("CumSum", [shape], shape, constants=last)
        order = [0, 2, 1, *range(3, axes)]
        turned = tuple(shape[axis] for axis in order)
        yield f"Transpose, {axes} axes", model("Transpose", [shape], turned, perm=order)
        joined = (*shape[:2], 2 * shape[2], *shape[3:])
        yield f"Concat, {axes} axes", model("Concat", [shape, shape], joined, axis=2)


def model(
    operator: str,
    inputs: list[tuple[int, ...]],
    output: tuple[int, ...],
    element: int = FLOAT,
    constants: dict[str, np.ndarray] | None = None,
    **attributes: object,
) -> onnx.ModelProto:
    """Return a graph of one node."""
    constants = constants or {}
    given = [helper.make_tensor_value_info(f"x{i}", FLOAT, shape) for i, shape in enumerate(inputs)]
    names = [*(value.name for value in given), *constants]
    node = helper.make_node(operator, names, ["y"], name="node", **attributes)
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    result = helper.make_tensor_value_info("y", element, output)
    graph = helper.make_graph([node], "graph", given, [result], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def main(hardware: str) -> None:
    """Print one line for each graph."""
    named = dict(cases())
    answers = estimates([graph.SerializeToString() for graph in named.values()], hardware)
    for (name, graph), answer in zip(named.items(), answers, strict=True):
        # An operator without a cost is compiled all the same.
        refused = isinstance(answer, ExportError) and "no cost" not in str(answer)
        said = bool(qinvert.doctor(graph, hardware=hardware).count(Effect.REFUSED))
        print(f"{name}: {'refused' if refused else 'taken'}{'' if refused == said else ', doctor differs'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
