"""What both lowerings share: shapes, scales, data movement, widened products."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qinvert import arithmetic
from qinvert.errors import ExportError
from qinvert.execute import constant_matrix
from qinvert.export.graph import GraphBuilder, Sizes
from qinvert.export.interface import ANY_BATCH, GraphOutput, Interface
from qinvert.formats import INT8, IntFormat
from qinvert.plan import LayerPlan, Quantization, Requantize
from qinvert.profiles import Profile
from qinvert.program import Evaluator
from qinvert.steps import BETA, INPUT, Axis, Concat, Constant, MatMul, Rescale, Scale, Slice
from qinvert.supports import Support, cut, strictly_lower

#: Tensor axis of a concat or slice of rows and columns.
AXES = {Axis.ROWS: 2, Axis.COLUMNS: 3}

#: Identity blocks that one residual term may add to a product; calibration needs 16.
MAX_IDENTITY_BLOCKS = 32

#: Names of the quantized beta, as it multiplies rows or columns.
VECTORS = {Axis.ROWS: "beta/rows", Axis.COLUMNS: "beta/columns"}

#: Values on a grid, without the zero point.
IntArray = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the program, or a constant that waits for its consumer's scale."""

    #: Graph tensor that consumers read, the high one of two planes; empty for a constant.
    name: str
    #: Name in the plan.
    tensor: str
    #: Set for constants.
    constant: Constant | None = None
    #: Graph tensor of the low plane, if there are two.
    low: str = ""
    #: Where the integers are 1.0 more than the tensor's, ``[rows, columns]`` of a block; None is nowhere.
    ones: Support | None = field(default=None, compare=False)

    @property
    def planes(self) -> tuple[str, ...]:
        """Graph tensors, high plane first."""
        return (self.name, self.low) if self.low else (self.name,)


class Operands(NamedTuple):
    """What a product multiplies, residual terms included."""

    left: str
    right: str
    #: As `Value.ones`, of the result.
    ones: Support | None


class GraphLowering(Evaluator[Value]):
    """Appends the nodes of a plan's program to a graph.

    For a fixed batch, a tensor of ``blocks`` blocks is ``[1, blocks * batch,
    rows, columns]``: compilers want 1 in front.  For any batch it is ``[blocks,
    batch, rows, columns]``: no index depends on the batch.
    Subclasses say how a value is read (`operand`) and finished.
    """

    def __init__(self, plan: LayerPlan, profile: Profile, interface: Interface, graph: GraphBuilder) -> None:
        self.plan = plan
        self.profile = profile
        self.batch = interface.batch
        self.graph = graph
        #: Name of the result's integers where the graph returns them.
        self.returned = interface.output_name(plan) if interface.output is GraphOutput.INTEGERS else ""
        #: Float tensor that has the batch as its second size.
        self.given = ""
        #: The quantized beta, by what it multiplies.
        self.vectors: dict[Axis, Value] = {}
        #: Tensors that can carry an identity.
        self.triangular = strictly_lower(plan.program) if self._integer_residuals else set()
        self._shifted: dict[tuple[str, int], Value] = {}

    @property
    def _integer_residuals(self) -> bool:
        return self.plan.requantize is Requantize.MULTIPLIER

    @abstractmethod
    def source(self, tensor: str, name: str) -> Value:
        """Quantize the float tensor ``name``, which holds the input ``tensor``, and return that."""

    @abstractmethod
    def finish(self, name: str, result: Value) -> str:
        """Append the dequantized output of the program as float tensor ``name``."""

    @abstractmethod
    def literal(self, name: str, array: IntArray, grid: Quantization, *, spread: bool = False) -> str:
        """Add int8 values on ``grid`` and return what operators read; `spread` them over any batch."""

    @abstractmethod
    def shifted(self, name: str, tensor: str, value: str, identity: str) -> str:
        """Append ``value + identity``, of the tensor's shape and grid, as what operators read."""

    @abstractmethod
    def joined(self, name: str, parts: list[str], axis: int, shape: Sizes, grid: Quantization) -> str:
        """Append a Concat of operands that share ``grid``."""

    def stored(self, tensor: str) -> str:
        """Name of the integer tensor; M has a suffix, because the graph's input may be called M."""
        if self._returns(tensor):
            return self.returned
        return f"{tensor}/{self.storage(self.grid(tensor)).element}" if tensor == INPUT else tensor

    def storage(self, grid: Quantization) -> IntFormat:
        """Format whose container and zero point the graph has for values of a grid."""
        return self.profile.storage_of(grid.format)

    def grid(self, tensor: str) -> Quantization:
        """Quantization of a tensor of the program."""
        return self.plan.tensors[tensor if tensor in self.plan.tensors else BETA]

    def shape(self, tensor: str) -> Sizes:
        """Shape of a tensor of the program in the graph."""
        shapes = self.plan.program.shapes
        blocks, rows, columns = shapes[tensor] if tensor in shapes else shapes[BETA]
        if tensor == VECTORS[Axis.COLUMNS] and tensor not in shapes:
            rows, columns = columns, rows
        return [*self._stack(blocks), rows, columns]

    def _stack(self, blocks: int) -> Sizes:
        return [blocks, ANY_BATCH] if self.batch is None else [1, blocks * self.batch]

    def _axis(self, axis: Axis) -> int:
        return AXES.get(axis, 0 if self.batch is None else 1)

    def scale_of(self, grid: Quantization) -> str:
        """Scalar initializer of a scale, shared by all tensors that have it."""
        return self.graph.scalar(f"scale/{grid.scale!r}", grid.scale)

    def zero_point(self, fmt: IntFormat = INT8) -> str:
        """Scalar initializer of the zero point of a stored format."""
        name = "zero_point" if fmt == INT8 else f"zero_point/{fmt.element}"
        return self.graph.initializer(name, np.array(fmt.zero_point, dtype=fmt.element))

    def constant(self, constant: Constant, blocks: int) -> Value:
        return Value("", constant.name, constant)

    def concat(self, step: Concat, sources: list[Value]) -> Value:
        grid, shape = self.grid(step.output), self.shape(step.output)
        sources, ones = self._joined_ones(step, [self.movable(step, value) for value in sources])
        names = []
        for i, name in enumerate(self.plane_names(step.output)):
            parts = [self._part(value, i, step, grid) for value in sources]
            names.append(self.joined(name, parts, self._axis(step.axis), shape, grid))
        return Value(names[0], step.output, low="".join(names[1:]), ones=ones)

    def _joined_ones(self, step: Concat, sources: list[Value]) -> tuple[list[Value], Support | None]:
        if all(value.ones is None for value in sources):
            return sources, None
        ones = [self._ones(value) for value in sources]
        if step.axis != Axis.BLOCKS:
            return sources, np.concatenate(ones, axis=AXES[step.axis] - 2)
        if all(np.array_equal(pattern, ones[0]) for pattern in ones):
            return sources, ones[0]
        return [self.plain(value) for value in sources], None

    def _ones(self, value: Value) -> Support:
        if value.ones is not None:
            return value.ones
        constant = value.constant
        sizes = (constant.rows, constant.columns) if constant else self.plan.program.shapes[value.tensor][1:]
        return np.zeros(sizes, np.bool_)

    def sliced_ones(self, step: Slice, source: Value) -> Support | None:
        """Return `Value.ones` of a slice."""
        ones = None if source.ones is None else cut(step, source.ones)
        return ones if ones is not None and ones.any() else None

    def movable(self, step: Concat | Slice, value: Value) -> Value:
        """Return what a step moves: integers that the graph returns are those of the program."""
        return self.plain(value) if self._returns(step.output) else value

    def _returns(self, tensor: str) -> bool:
        return bool(self.returned) and tensor == self.plan.program.output

    def plain(self, value: Value) -> Value:
        """Return the tensor as the program has it, without ones."""
        return value if value.ones is None else self._shift(value, value.ones, -1)

    def plus_identity(self, value: Value) -> Value:
        """Return the tensor plus the identity."""
        identity = np.eye(self.plan.program.shapes[value.tensor].columns, dtype=np.bool_)
        if value.ones is not None and np.array_equal(value.ones, identity):
            return value
        return self._shift(self.plain(value), identity, 1)

    def _shift(self, value: Value, ones: Support, sign: int) -> Value:
        tensor = value.tensor
        if (tensor, sign) not in self._shifted:
            kind = "identity" if np.array_equal(ones, np.eye(len(ones))) else f"{tensor}/ones"
            identity = self._diagonal(tensor, ones, sign * self._one(tensor), kind)
            name = f"{tensor}/{'plus' if sign > 0 else 'minus'}_identity"
            self._shifted[tensor, sign] = Value(
                self.shifted(name, tensor, value.name, identity), tensor, ones=ones if sign > 0 else None
            )
        return self._shifted[tensor, sign]

    def _one(self, tensor: str) -> int:
        """Return the integer that means 1.0 on the tensor's grid, 0 if there is none."""
        grid = self.grid(tensor)
        return grid.one if grid.one <= grid.largest_one else 0

    def carries_identity(self, tensor: str) -> bool:
        """Whether the tensor can be stored with the identity added to it."""
        return tensor in self.triangular and self._one(tensor) > 0 and not self._returns(tensor)

    def _takes_identity(self, step: MatMul) -> tuple[bool, bool]:
        """Return which operands take an identity: (left + I) right = left right + right."""
        terms = list(step.add)
        left = step.right in terms and self.carries_identity(step.left)
        if left:
            terms.remove(step.right)
        right = step.left in terms and self.carries_identity(step.right)
        # Both leave the product of the identities, which must be the result's.
        right = right and not (left and not self._yields_identity(step))
        # No product is both shifted and widened: QNN miscompiles a Concat of a tensor and of that
        # tensor plus a constant.
        widened = left + right < len(step.add) + len(step.subtract)
        return (False, False) if widened else (left, right)

    def _yields_identity(self, step: MatMul) -> bool:
        if not self.carries_identity(step.output):
            return False
        accumulators = [self._one(step.left) * k for k in self.plan.identity_planes(step, step.left)]
        factor, grid = self.plan.multiplier(step), self.grid(step.output)
        found = arithmetic.requantize_partial_scalar(accumulators, factor, grid.scale, grid.format)
        return found == self._one(step.output)

    def keeps_integers(self, step: Rescale) -> bool:
        """Whether a rescaling changes nothing: no node is needed, unless the result has a name of its own."""
        same = self.grid(step.source) == self.grid(step.output)
        return step.factor == 1 and same and step.output != self.plan.program.output

    def plane_names(self, tensor: str) -> list[str]:
        """Names of the int8 tensors of every plane, high first."""
        if self.grid(tensor).format.planes == 1:
            return [self.stored(tensor)]
        return [f"{tensor}/high", f"{tensor}/low"]

    def _part(self, value: Value, plane: int, step: Concat, grid: Quantization) -> str:
        if value.constant is None:
            return value.planes[plane]
        matrix = constant_matrix(value.constant).numpy().astype(np.int8)
        return self._repeated(value.tensor, matrix, self.plan.program.shapes[step.output].blocks, grid)

    def _repeated(self, name: str, matrix: IntArray, blocks: int, grid: Quantization) -> str:
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
        spans = [(self._axis(Axis.BLOCKS), blocks), (2, step.rows), (3, step.columns)]
        cut = [(axis, *span) for axis, span in spans if span is not None]
        axes, starts, ends = zip(*cut, strict=True)
        return [self._indices(values) for values in (starts, ends, axes)]

    def _indices(self, values: tuple[int, ...]) -> str:
        name = f"indices/{'_'.join(map(str, values))}"
        return self.graph.initializer(name, np.array(values, dtype=np.int64))

    def widened(self, step: MatMul, left: Value, right: Value) -> Operands:
        """Return operands whose plain product holds the residual terms, too.

        ``A B + B = (A + I) B`` where A can carry an identity, and ``(A + I) (B
        + I) = (A B + A + B) + I`` where both can.  Else ``A B + B = [A, kI] [B;
        B]`` and ``A B + A = [A, A] [B; kI]``, with ``k = 1 / scale`` split
        into as many identity blocks of at most 127 as it takes.  The sum
        happens in the accumulator either way: exact, int8 only.
        """
        shift_left, shift_right = self._takes_identity(step)
        lefts = [(self.plus_identity(left) if shift_left else self.plain(left)).name]
        rights = [(self.plus_identity(right) if shift_right else self.plain(right)).name]
        add = list(step.add)
        for shift, term in ((shift_left, step.right), (shift_right, step.left)):
            if shift:
                add.remove(term)
        for sign, names in ((1, add), (-1, step.subtract)):
            for name in names:
                for value in self._identity_values(step, name):
                    if name == step.right:
                        lefts.append(self._identity(step.left, sign * value))
                        rights.append(self.plain(right).name)
                    else:
                        lefts.append(self.plain(left).name)
                        rights.append(self._identity(step.right, sign * value))
        size = self.plan.program.shapes[step.output].columns
        return Operands(
            self.wide(f"{step.output}/left", step.left, lefts, 3),
            self.wide(f"{step.output}/right", step.right, rights, 2),
            np.eye(size, dtype=np.bool_) if shift_left and shift_right else None,
        )

    def _identity_values(self, step: MatMul, term: str) -> list[int]:
        blocks = self.plan.identity_blocks(step, term)
        if len(blocks) > MAX_IDENTITY_BLOCKS:
            partner = step.left if term == step.right else step.right
            raise ExportError(
                f"step {step.output!r}: 1.0 is {len(blocks)} times the largest integer of {partner!r}; "
                f"at most {MAX_IDENTITY_BLOCKS} identity blocks can widen a product, plan with "
                "requantize='divide'"
            )
        return blocks

    def _identity(self, tensor: str, value: int) -> str:
        size = self.plan.program.shapes[tensor].rows
        return self._diagonal(tensor, np.eye(size, dtype=np.bool_), value, "identity")

    def _diagonal(self, tensor: str, ones: Support, value: int, kind: str) -> str:
        """Add the constant ``value`` where ``ones`` are, for every block of ``tensor``."""
        blocks, grid = self.plan.program.shapes[tensor].blocks, self.grid(tensor)
        matrix: IntArray = ones * np.array(value, dtype=grid.format.element)
        sizes = "x".join(map(str, dict.fromkeys(ones.shape)))
        return self._repeated(f"{kind}/{blocks * (self.batch or 1)}x{sizes}/{value}", matrix, blocks, grid)

    def wide(self, name: str, tensor: str, parts: list[str], axis: int) -> str:
        """Join operands of the shape of ``tensor``; one alone stays as it is."""
        if len(parts) == 1:
            return parts[0]
        shape, sizes = self.shape(tensor), self.plan.program.shapes[tensor]
        shape[axis] = len(parts) * sizes[axis - 1]
        return self.joined(name, parts, axis, shape, self.grid(tensor))

    def identity_matrix(self) -> str:
        """Float32 identity that turns S into T."""
        eye = np.eye(self.plan.chunk, dtype=np.float32)[None, None]
        return self.graph.initializer("identity", eye)

    def run(self, source: str, output: str, beta: str = "") -> None:
        """Append the whole program between two float tensors, ``beta`` a third one where it is factored.

        Where the graph returns integers, ``output`` is what it calls them.
        """
        program, shape = self.plan.program, self.shape(INPUT)
        self.given = source
        value = self.source(INPUT, source)
        for axis in dict.fromkeys(step.axis for step in program.steps if isinstance(step, Scale)):
            self.vectors[axis] = self.source(VECTORS[axis], self._turned(beta, axis))
        result = program.evaluate(self, value, vectors={name: Value("", name) for name in program.vectors})
        if self.returned:
            return
        if not program.implicit_identity:
            self.finish(output, self.plain(result))
            return
        if self._is_inverse(result):
            self.finish(output, result)
            return
        strict, result = f"{output}/strictly_lower", self.plain(result)
        if program.vectors:
            self.graph.node("Mul", [self.finish(f"{output}/factored", result), beta], strict, shape)
        else:
            self.finish(strict, result)
        self.graph.node("Add", [strict, self.identity_matrix()], output, shape)

    def _is_inverse(self, result: Value) -> bool:
        """Whether the integers of the result are those of T, and its diagonal dequantizes to 1.0 exactly."""
        if result.ones is None or self.plan.program.vectors:
            return False
        grid, integer = self.plan.output, self._one(result.tensor)
        one = arithmetic.dequantize_scalar(integer, grid.scale, grid.format)
        return one == 1.0 and np.array_equal(result.ones, np.eye(self.plan.chunk, dtype=np.bool_))

    def _turned(self, beta: str, axis: Axis) -> str:
        if axis == Axis.ROWS:
            return beta
        shape = self.shape(VECTORS[axis])
        return self.graph.node("Transpose", [beta], "beta/transposed", shape, perm=[0, 1, 3, 2])
