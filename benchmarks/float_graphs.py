"""ONNX graphs of floating point that integer ones are compared with."""

from __future__ import annotations

import numpy as np
import onnx

from qinvert.execution.tensors import constant_matrix
from qinvert.export.graph import GraphBuilder
from qinvert.export.lowering.tensors import AXES, TRANSPOSED
from qinvert.program.evaluator import Evaluator
from qinvert.program.ports import MATRIX
from qinvert.program.program import Program
from qinvert.program.steps import (
    Add,
    Axis,
    Concat,
    Constant,
    Exponential,
    Mask,
    MatMul,
    Multiply,
    Rescale,
    Scale,
    Slice,
    Subtract,
    Transpose,
)

#: Operator set of the graphs.
OPSET = 19
#: Tensor axis of blocks and matrices.
BLOCKS_AXIS = 1


class FloatLowering(Evaluator[str]):
    """Appends a floating-point operator for every step and every residual term."""

    def __init__(self, program: Program, batch: int, graph: GraphBuilder, element: str = "float32") -> None:
        self.program = program
        self.batch = batch
        self.graph = graph
        self.element = element

    def _shape(self, tensor: str) -> list[int]:
        blocks, rows, columns = self.program.shapes[tensor]
        return [1, blocks * self.batch, rows, columns]

    def _node(self, operator: str, tensor: str, inputs: list[str], **attributes: int | list[int]) -> str:
        return self.graph.node(operator, inputs, tensor, self._shape(tensor), self.element, **attributes)

    def constant(self, constant: Constant, blocks: int) -> str:
        if self.element == "float16":
            # Compilers for NPUs are slow where a mask broadcasts.
            return self._repeated(constant, blocks * self.batch)
        # Masks broadcast; what is joined does not, see `concat`.
        return self.graph.initializer(constant.name, constant_matrix(constant).numpy()[None, None])

    def matmul(self, step: MatMul, left: str, right: str, add: list[str], subtract: list[str]) -> str:
        terms = [("Add", term) for term in add] + [("Sub", term) for term in subtract]
        if not terms:
            return self._node("MatMul", step.output, [left, right])
        shape = self._shape(step.output)
        total = self.graph.node("MatMul", [left, right], f"{step.output}/product", shape, self.element)
        for i, (operator, term) in enumerate(terms, start=1):
            name = step.output if i == len(terms) else f"{step.output}/sum_{i}"
            total = self.graph.node(operator, [total, term], name, shape, self.element)
        return total

    def add(self, step: Add, left: str, right: str) -> str:
        return self._node("Add", step.output, [left, right])

    def subtract(self, step: Subtract, left: str, right: str) -> str:
        return self._node("Sub", step.output, [left, right])

    def multiply(self, step: Multiply, left: str, right: str) -> str:
        return self._node("Mul", step.output, [left, right])

    def exponential(self, step: Exponential, source: str) -> str:
        return self._node("Exp", step.output, [source])

    def rescale(self, step: Rescale, source: str) -> str:
        if step.factor == 1:
            return source  # nothing to round
        factor = self.graph.initializer(f"{step.output}/factor", np.array(step.factor, dtype=self.element))
        return self._node("Mul", step.output, [source, factor])

    def scale(self, step: Scale, source: str, vector: str) -> str:
        raise NotImplementedError("factored programs are not compared")

    def mask(self, step: Mask, source: str, constant: str) -> str:
        return self._node("Mul", step.output, [source, constant])

    def transpose(self, step: Transpose, source: str) -> str:
        return self._node("Transpose", step.output, [source], perm=TRANSPOSED)

    def slice(self, step: Slice, source: str) -> str:
        blocks = None if step.blocks is None else [edge * self.batch for edge in step.blocks]
        cut = [(a, *s) for a, s in ((1, blocks), (2, step.rows), (3, step.columns)) if s is not None]
        indices = [np.array(values, dtype=np.int64) for values in zip(*cut, strict=True)]
        axes, starts, ends = (self.graph.initializer(f"indices/{v.tolist()}", v) for v in indices)
        return self._node("Slice", step.output, [source, starts, ends, axes])

    def concat(self, step: Concat, sources: list[str]) -> str:
        constants = {constant.name: constant for constant in self.program.constants}
        along_blocks = step.axis == Axis.BLOCKS
        # Each part of a stack is one block; parts beside each other have as many as the result.
        blocks = self.batch if along_blocks else self._shape(step.output)[1]
        parts = [
            self._repeated(constants[name], blocks) if name in constants else tensor
            for name, tensor in zip(step.sources, sources, strict=True)
        ]
        axis = BLOCKS_AXIS if along_blocks else AXES[step.axis]
        return self._node("Concat", step.output, parts, axis=axis)

    def _repeated(self, constant: Constant, blocks: int) -> str:
        matrix = constant_matrix(constant).numpy().astype(self.element)
        repeated = np.broadcast_to(matrix, (1, blocks, *matrix.shape))
        return self.graph.initializer(f"{constant.name}/{blocks}", repeated)


def half_graph(program: Program, batch: int, chains: int = 1) -> onnx.ModelProto:
    """Return ``S = (I - M)^-1 - I`` by the steps of a program in float16, ``[1, batch, C, C]``.

    The batch runs in ``chains`` independent parts, as in the graphs of integers.
    """
    size, chunk = batch // chains, program.chunk
    shape, part = ([1, count, chunk, chunk] for count in (batch, size))
    each, graph = GraphBuilder(), GraphBuilder()
    given = {MATRIX: each.input(MATRIX, part, "float16")}
    (result,) = program.evaluate(FloatLowering(program, size, each, "float16"), given).values()
    whole, results = graph.input(MATRIX, shape, "float16"), []
    for k in range(chains):
        edges = [np.array([value], dtype=np.int64) for value in (k * size, (k + 1) * size, BLOCKS_AXIS)]
        names = [graph.initializer(f"indices/{edge.tolist()}", edge) for edge in edges]
        cut = graph.node("Slice", [whole, *names[:2], names[2]], f"chain_{k}", part, "float16")
        graph.inline(each, f"chain_{k}/", {MATRIX: cut})
        results.append(f"chain_{k}/{result}")
    graph.output(graph.node("Concat", results, "S", shape, "float16", axis=BLOCKS_AXIS))
    return graph.model(program.name, OPSET, {}, program.title)


def float_graph(program: Program, batch: int) -> onnx.ModelProto:
    """Return ``T = (I - M)^-1`` by the steps of a program in float32, ``[1, batch, C, C]``."""
    graph, shape = GraphBuilder(), [1, batch, program.chunk, program.chunk]
    (result,) = program.evaluate(
        FloatLowering(program, batch, graph), {MATRIX: graph.input(MATRIX, shape)}
    ).values()
    graph.output(_plus_identity(graph, result, shape))
    return graph.model(program.name, OPSET, {}, program.title)


def row_loop(chunk: int, batch: int) -> onnx.ModelProto:
    """Return the inverse row after row, ``A[i, :i] += A[i, :i] A[:i, :i]`` from ``A = M``.

    This is what tracing a Python loop over rows with assignments into slices gives.
    Every assignment copies the whole stack, because ONNX tensors are values.
    """
    graph, shape = GraphBuilder(), [1, batch, chunk, chunk]
    rows_first = [chunk, 1, batch, chunk]
    total = graph.input(MATRIX, shape)
    for i in range(1, chunk):
        row = _appended(graph, total, f"row_{i}", i, batch, chunk)
        turned = graph.node("Transpose", [total], f"row_{i}/turned", rows_first, perm=[2, 0, 1, 3])
        index = graph.initializer(f"row_{i}/index", np.array([[i]], dtype=np.int64))
        updated = graph.node("ScatterND", [turned, index, row], f"row_{i}/updated", rows_first)
        total = graph.node("Transpose", [updated], f"row_{i}/A", shape, perm=[1, 2, 0, 3])
    graph.output(_plus_identity(graph, total, shape))
    return graph.model("row_loop", OPSET, {}, f"row loop, {chunk}")


def _appended(graph: GraphBuilder, total: str, name: str, i: int, batch: int, chunk: int) -> str:
    """Append row i of the inverse as ``[1, 1, batch, chunk]``."""
    row = _cut(graph, total, f"{name}/old", [i, 0], [i + 1, i], [1, batch, 1, i])
    rest = _cut(graph, total, f"{name}/rest", [i, i], [i + 1, chunk], [1, batch, 1, chunk - i])
    above = _cut(graph, total, f"{name}/above", [0, 0], [i, i], [1, batch, i, i])
    column = graph.node("Transpose", [row], f"{name}/column", [1, batch, i, 1], perm=[0, 1, 3, 2])
    scaled = graph.node("Mul", [column, above], f"{name}/scaled", [1, batch, i, i])
    axes = graph.initializer("rows", np.array([2], dtype=np.int64))
    summed = graph.node("ReduceSum", [scaled, axes], f"{name}/sum", [1, batch, 1, i], keepdims=1)
    new = graph.node("Add", [row, summed], f"{name}/new", [1, batch, 1, i])
    whole = graph.node("Concat", [new, rest], f"{name}/whole", [1, batch, 1, chunk], axis=3)
    return graph.node("Transpose", [whole], f"{name}/update", [1, 1, batch, chunk], perm=[0, 2, 1, 3])


def _cut(
    graph: GraphBuilder, source: str, name: str, starts: list[int], ends: list[int], shape: list[int]
) -> str:
    values = {"starts": starts, "ends": ends, "axes": [2, 3]}
    indices = [
        graph.initializer(f"{name}/{kind}", np.array(value, dtype=np.int64)) for kind, value in values.items()
    ]
    return graph.node("Slice", [source, *indices], name, shape)


def _plus_identity(graph: GraphBuilder, strict: str, shape: list[int]) -> str:
    eye = graph.initializer("identity", np.eye(shape[-1], dtype=np.float32)[None, None])
    return graph.node("Add", [strict, eye], "T", shape)
