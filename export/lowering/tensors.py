"""Tensors of a program in a graph: their names, shapes, grids, and the constants among them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from qinvert.export.graph import GraphBuilder, Sizes
from qinvert.export.interface import ANY_BATCH, GraphOutput, Interface
from qinvert.formats import INT8, IntFormat
from qinvert.plan.carried_identity import one_of
from qinvert.plan.quantization import Quantization
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.profiles import Profile
from qinvert.program.sparsity import Support
from qinvert.program.steps import Axis, Rescale, Scale, Slice

#: Tensor axis of a concat or slice of rows and columns.
AXES = {Axis.ROWS: 2, Axis.COLUMNS: 3}

#: Order of the axes of a tensor whose blocks are transposed.
TRANSPOSED = [0, 1, 3, 2]

#: Values on a grid, without the zero point.
IntArray = npt.NDArray[Any]


def vector_name(vector: str, axis: Axis) -> str:
    """Name of a quantized vector input, as it multiplies rows or columns."""
    return f"{vector}/{axis}"


class ProgramTensors(ABC):
    """What the tensors of a plan are in a graph, whatever the operators between them.

    For a fixed batch, a tensor of ``blocks`` blocks is ``[1, blocks * batch,
    rows, columns]``: compilers want 1 in front.  For any batch it is ``[blocks,
    batch, rows, columns]``: no index depends on the batch.
    """

    def __init__(
        self, plan: QuantizedProgram, profile: Profile, interface: Interface, graph: GraphBuilder
    ) -> None:
        self.plan = plan
        self.profile = profile
        self.batch = interface.batch
        self.graph = graph
        program = plan.program
        #: Names of float tensors that the graph takes and returns; integers must have other names.
        self.ends = interface.end_names(plan)
        #: Tensors of the outputs.
        self.results = {port.tensor for port in program.outputs}
        #: Vector inputs by the name that they have as they multiply rows or columns.
        self.vectors = {
            vector_name(step.vector, step.axis): (step.vector, step.axis)
            for step in program.steps
            if isinstance(step, Scale)
        }
        self.interface = interface
        #: Matrices that the graph takes as integers.
        self.integer_inputs = interface.integer_inputs(plan)
        integers = interface.output is GraphOutput.INTEGERS
        #: What the graph calls the integers of results that it returns as they are stored, by tensor.
        self.returned = (
            {
                tensor: name
                for tensor, name in interface.result_names(plan).items()
                if not self.converts(tensor)
            }
            if integers
            else {}
        )
        #: Float tensor that has the batch as its second size.
        self.given = ""

    @abstractmethod
    def literal(self, name: str, array: IntArray, grid: Quantization, *, spread: bool = False) -> str:
        """Add int8 values on ``grid`` and return what operators read; `spread` them over any batch."""

    def stored(self, tensor: str) -> str:
        """Name of the integer tensor, with a suffix where a float end of the graph may have that name."""
        if self.returns(tensor):
            return self.returned[tensor]
        clashes = tensor in self.ends and tensor in self.plan.tensors
        return f"{tensor}/{self.storage(self.grid(tensor)).element}" if clashes else tensor

    def storage(self, grid: Quantization) -> IntFormat:
        """Format whose container and zero point the graph has for values of a grid."""
        return self.profile.storage_of(grid.format)

    def converts(self, tensor: str) -> bool:
        """Whether integers at an end of the graph are stored in another way than inside."""
        return self.profile.end_of(self.grid(tensor).format) != self.storage(self.grid(tensor))

    def grid(self, tensor: str) -> Quantization:
        """Quantization of a tensor or constant of the program."""
        vector, _ = self.vectors.get(tensor, (tensor, Axis.ROWS))
        return self.plan.grid(vector)

    def shape(self, tensor: str) -> Sizes:
        """Shape of a tensor of the program in the graph."""
        vector, axis = self.vectors.get(tensor, (tensor, Axis.ROWS))
        blocks, rows, columns = self.plan.program.shapes[vector]
        sizes = [columns, rows] if axis == Axis.COLUMNS else [rows, columns]
        return [*self._stack(blocks), *sizes]

    def _stack(self, blocks: int) -> Sizes:
        return [blocks, ANY_BATCH] if self.batch is None else [1, blocks * self.batch]

    def axis_of(self, axis: Axis) -> int:
        """Tensor axis that a step's axis is in the graph."""
        return AXES.get(axis, 0 if self.batch is None else 1)

    def scale_of(self, grid: Quantization) -> str:
        """Scalar initializer of a scale, shared by all tensors that have it."""
        return self.graph.scalar(f"scale/{grid.scale!r}", grid.scale)

    def zero_point(self, fmt: IntFormat = INT8) -> str:
        """Scalar initializer of the zero point of a stored format."""
        name = "zero_point" if fmt == INT8 else f"zero_point/{fmt.element}"
        return self.graph.initializer(name, np.array(fmt.zero_point, dtype=fmt.element))

    def plane_names(self, tensor: str) -> list[str]:
        """Names of the int8 tensors of every plane, high first."""
        if self.grid(tensor).format.planes == 1:
            return [self.stored(tensor)]
        return [f"{tensor}/high", f"{tensor}/low"]

    def keeps_integers(self, step: Rescale) -> bool:
        """Whether a rescaling needs no node.

        A result of one plane has a node all the same, so that it has a name of
        its own; rounding its integers again changes nothing.
        """
        unnamed = step.output not in self.results or self.grid(step.output).format.planes > 1
        return self.plan.keeps_integers(step) and unnamed

    def returns(self, tensor: str) -> bool:
        """Whether the graph returns the tensor's integers."""
        return tensor in self.returned

    def one_of(self, tensor: str) -> int:
        """Return the integer that means 1.0 on the tensor's grid, 0 if there is none."""
        return one_of(self.grid(tensor))

    def diagonal(self, tensor: str, ones: Support, value: int, kind: str) -> str:
        """Add the constant ``value`` where ``ones`` are, for every block of ``tensor``."""
        blocks, grid = self.plan.program.shapes[tensor].blocks, self.grid(tensor)
        matrix: IntArray = ones * np.array(value, dtype=grid.format.element)
        sizes = "x".join(map(str, dict.fromkeys(ones.shape)))
        return self.repeated(f"{kind}/{blocks * (self.batch or 1)}x{sizes}/{value}", matrix, blocks, grid)

    def repeated(self, name: str, matrix: IntArray, blocks: int, grid: Quantization) -> str:
        """Add one matrix, the same for every block of every input: Concat does not broadcast."""
        stack = (blocks, 1) if self.batch is None else (1, blocks * self.batch)
        return self.literal(name, np.broadcast_to(matrix, (*stack, *matrix.shape)), grid, spread=True)

    def spread(self, name: str, array: IntArray, element: str) -> str:
        """Return a constant ``[blocks, 1, rows, columns]`` for every matrix of a batch that is not fixed."""
        if self.batch is not None:
            return name
        output, (blocks, _, *sizes) = f"{name}/spread", array.shape
        if output not in self.graph:
            shape = [blocks, ANY_BATCH, *sizes]
            self.graph.node("Expand", [name, self._batch_shape()], output, shape, element)
        return output

    def _batch_shape(self) -> str:
        """``[1, batch, 1, 1]``."""
        output = "batch/shape"
        if output in self.graph:
            return output
        stack = self.graph.node("Shape", [self.given], "batch/stack", [2], "int64", start=0, end=2)
        ones = self.graph.initializer("batch/ones", np.ones(2, dtype=np.int64))
        return self.graph.node("Concat", [stack, ones], output, [4], "int64", axis=0)

    def slice_inputs(self, step: Slice) -> list[str]:
        """Return the initializers ``starts, ends, axes`` of a slice, one node for all axes."""
        each = self.batch or 1
        blocks = None if step.blocks is None else (step.blocks[0] * each, step.blocks[1] * each)
        spans = [(self.axis_of(Axis.BLOCKS), blocks), (2, step.rows), (3, step.columns)]
        cut = [(axis, *span) for axis, span in spans if span is not None]
        axes, starts, ends = zip(*cut, strict=True)
        return [self._indices(values) for values in (starts, ends, axes)]

    def _indices(self, values: tuple[int, ...]) -> str:
        name = f"indices/{'_'.join(map(str, values))}"
        return self.graph.initializer(name, np.array(values, dtype=np.int64))

    def identity_matrix(self) -> str:
        """Float32 identity that turns S into T."""
        eye = np.eye(self.plan.chunk, dtype=np.float32)[None, None]
        return self.graph.initializer("identity", eye)
