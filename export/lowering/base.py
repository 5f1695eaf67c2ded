"""What both lowerings share: data movement, carried identities, widened products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from qinvert.errors import ExportError
from qinvert.export.graph import GraphBuilder, Sizes
from qinvert.export.interface import GraphOutput, InputType, Interface
from qinvert.export.lowering.tensors import AXES, TRANSPOSED, ProgramTensors, vector_name
from qinvert.numerics import scalar
from qinvert.plan.carried_identity import CarriedIdentities, joined_ones
from qinvert.plan.quantization import CONSTANT_GRID, Quantization, Requantize
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.profiles import Profile
from qinvert.program.evaluator import Evaluator
from qinvert.program.ports import Meaning, Port
from qinvert.program.sparsity import Support, constant_support
from qinvert.program.steps import Axis, Concat, Constant, MatMul, Slice

#: Identity blocks that one residual term may add to a product; calibration needs 16.
MAX_IDENTITY_BLOCKS = 32


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
    #: Where the integers are 1.0 more than the tensor's, ``[rows, columns]`` of a block; None means nowhere.
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


class GraphLowering(ProgramTensors, Evaluator[Value]):
    """Appends the nodes of a plan's program to a graph.

    Subclasses say how a value is read (`source`) and finished.
    """

    def __init__(
        self, plan: QuantizedProgram, profile: Profile, interface: Interface, graph: GraphBuilder
    ) -> None:
        super().__init__(plan, profile, interface, graph)
        #: Quantized vector inputs, by their names along rows or columns.
        self.factors: dict[str, Value] = {}
        self.identities = CarriedIdentities(plan, self.returned)
        self._shifted: dict[tuple[str, int], Value] = {}

    @property
    def _integer_residuals(self) -> bool:
        return self.plan.requantize is Requantize.MULTIPLIER

    @abstractmethod
    def source(self, tensor: str, name: str) -> Value:
        """Quantize the float tensor ``name``, which holds the input ``tensor``, and return the result."""

    def converted(self, name: str, result: Value) -> None:
        """Append the integers of a result as the ends of graphs store them."""
        raise ExportError(
            f"profile {self.profile.name!r} stores {name!r} in another way at the end of the graph than "
            f"inside, which its lowering {self.profile.lowering!r} cannot write; leave out its field ends"
        )

    @abstractmethod
    def finish(self, name: str, result: Value) -> str:
        """Append a dequantized result of the program as float tensor ``name``."""

    @abstractmethod
    def shifted(self, name: str, tensor: str, value: str, identity: str) -> str:
        """Append ``value + identity``, of the tensor's shape and grid, as what operators read."""

    @abstractmethod
    def joined(self, name: str, parts: list[str], axis: int, shape: Sizes, grid: Quantization) -> str:
        """Append a Concat of operands that share ``grid``."""

    def given_float(self, tensor: str, name: str) -> Value:
        """Return an input that is not rounded; integers among the ends still have axes of their own."""
        return Value(self.entry(tensor, name) if tensor in self.integer_inputs else name, tensor)

    def copied(self, name: str, result: Value) -> None:
        """Append a copy of a result by a slice of everything: every profile has that operator."""
        rows = self.plan.program.shapes[result.tensor].rows
        bounds = [self._indices((value,)) for value in (0, rows, AXES[Axis.ROWS])]
        shape, element = self.shape(result.tensor), self.graph.element(result.name)
        self.graph.node("Slice", [result.name, *bounds], name, shape, element)

    def constant(self, constant: Constant, blocks: int) -> Value:
        return Value("", constant.name, constant)

    def operand(self, value: Value, blocks: int = 0, grid: Quantization = CONSTANT_GRID) -> Value:
        """Return the right operand of a product or sum.

        A constant is written onto a grid as ``[rows, columns]``, or once for each of ``blocks``.
        """
        if value.constant is None:
            return value
        matrix = constant_support(value.constant).astype(grid.format.element) * grid.one
        if blocks:
            return Value(self.repeated(f"{value.tensor}/{blocks}", matrix, blocks, grid), value.tensor)
        return Value(self.literal(f"{value.tensor}/matrix", matrix, grid), value.tensor)

    def concat(self, step: Concat, sources: list[Value]) -> Value:
        grid, shape = self.grid(step.output), self.shape(step.output)
        sources, ones = self._joined_ones(step, [self.movable(step, value) for value in sources])
        names = []
        for i, name in enumerate(self.plane_names(step.output)):
            parts = [self._part(value, i, step, grid) for value in sources]
            names.append(self.joined(name, parts, self.axis_of(step.axis), shape, grid))
        return Value(names[0], step.output, low="".join(names[1:]), ones=ones)

    def _joined_ones(self, step: Concat, sources: list[Value]) -> tuple[list[Value], Support | None]:
        if all(value.ones is None for value in sources):
            return sources, None
        ones = joined_ones(step, [self._ones(value) for value in sources])
        return ([self.plain(value) for value in sources] if ones is None else sources), ones

    def _ones(self, value: Value) -> Support:
        if value.ones is not None:
            return value.ones
        constant = value.constant
        sizes = (constant.rows, constant.columns) if constant else self.plan.program.shapes[value.tensor][1:]
        return np.zeros(sizes, np.bool_)

    def movable(self, step: Concat | Slice, value: Value) -> Value:
        """Return what a step moves; integers that the graph returns must be those of the program."""
        return self.plain(value) if self.returns(step.output) else value

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
            identity = self.diagonal(tensor, ones, sign * self.one_of(tensor), kind)
            name = f"{tensor}/{'plus' if sign > 0 else 'minus'}_identity"
            self._shifted[tensor, sign] = Value(
                self.shifted(name, tensor, value.name, identity), tensor, ones=ones if sign > 0 else None
            )
        return self._shifted[tensor, sign]

    def _part(self, value: Value, plane: int, step: Concat, grid: Quantization) -> str:
        if value.constant is None:
            return value.planes[plane]
        matrix = constant_support(value.constant).astype(np.int8)
        return self.repeated(value.tensor, matrix, self.plan.program.shapes[step.output].blocks, grid)

    def widened(self, step: MatMul, left: Value, right: Value) -> Operands:
        """Return operands whose plain product also holds the residual terms.

        ``A B + B = (A + I) B`` where A can carry an identity, and ``(A + I) (B
        + I) = (A B + A + B) + I`` where both can.  Otherwise ``A B + B = [A, kI]
        [B; B]`` and ``A B + A = [A, A] [B; kI]``, with ``k = 1 / scale`` split
        into as many identity blocks of at most 127 as are needed.  In each case
        the sum happens in the accumulator: it is exact, and uses int8 only.
        """
        shift_left, shift_right = self.identities.taken_by(step)
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
        parts = self.plan.products[step.output].identity_parts(term)
        if parts.number > MAX_IDENTITY_BLOCKS:
            partner = step.left if term == step.right else step.right
            raise ExportError(
                f"step {step.output!r}: 1.0 is {parts.number} times the largest integer of {partner!r}; "
                f"at most {MAX_IDENTITY_BLOCKS} identity blocks can widen a product; plan with "
                "requantize='divide'"
            )
        return parts.blocks

    def _identity(self, tensor: str, value: int) -> str:
        size = self.plan.program.shapes[tensor].rows
        return self.diagonal(tensor, np.eye(size, dtype=np.bool_), value, "identity")

    def wide(self, name: str, tensor: str, parts: list[str], axis: int) -> str:
        """Join operands of the shape of ``tensor``; a single operand stays as it is."""
        if len(parts) == 1:
            return parts[0]
        shape, sizes = self.shape(tensor), self.plan.program.shapes[tensor]
        shape[axis] = len(parts) * sizes[axis - 1]
        return self.joined(name, parts, axis, shape, self.grid(tensor))

    def run(self, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        """Append the whole program between float tensors.

        Parameters
        ----------
        inputs : mapping
            Float tensor of every input port.
        outputs : mapping
            What the graph calls every output port; its integers where the
            graph returns those.
        """
        results = self._chained(inputs) if self._has_chains else self.values(inputs)
        for port in self.plan.program.outputs:
            if self.interface.output is not GraphOutput.INTEGERS:
                self._end(port, results[port.name], outputs[port.name], inputs)
            elif not self.returns(port.tensor) or outputs[port.name] not in self.graph:
                # A program may return an input as it is, which no node has written.
                self.converted(outputs[port.name], self.plain(results[port.name]))

    @property
    def _has_chains(self) -> bool:
        """Whether the graph is cut: what returns an input as it is has nothing to run side by side."""
        given = {port.tensor for port in self.plan.program.inputs}
        moved = all(port.tensor not in given for port in self.plan.program.outputs)
        return self.interface.chains > 1 and moved

    def values(self, inputs: Mapping[str, str]) -> dict[str, Value]:
        """Append the program between float tensors and the values of its outputs, which it returns."""
        program = self.plan.program
        self.given = next(iter(inputs.values()))
        values = {name: Value("", name) for name in program.vector_inputs}
        for port in program.inputs:
            if port.name not in values:
                values[port.name] = self.source(port.tensor, inputs[port.name])
        for name, tensor in self._vector_tensors(inputs).items():
            self.factors[name] = self.source(name, tensor)
        return program.evaluate(self, values)

    def _vector_tensors(self, inputs: Mapping[str, str]) -> dict[str, str]:
        """Float tensors of `vectors`, turned along their axes unless ``inputs`` has them so."""
        return {
            name: inputs[name] if name in inputs else self._turned(inputs[vector], vector, axis)
            for name, (vector, axis) in self.vectors.items()
        }

    def _chained(self, inputs: Mapping[str, str]) -> dict[str, Value]:
        """As `values`, with one copy of the program for each part of the batch."""
        program, part = self.plan.program, self.interface.part(self.entry_type)
        inner = type(self)(self.plan, self.profile, part, GraphBuilder())
        matrices = {name: inputs[name] for name in inputs if name not in program.vector_inputs}
        taken = matrices | self._vector_tensors(inputs)
        wholes = {name: self.entry(name, tensor) for name, tensor in taken.items()}
        names = {name: name if name in matrices else f"{name}/part" for name in taken}
        assert part.batch is not None
        for name, whole in wholes.items():
            one, _, *sizes = self.graph.shape(whole)
            inner.graph.input(names[name], [one, part.batch, *sizes], self.graph.element(whole))
        results = {port: inner.plain(value) for port, value in inner.values(names).items()}
        for i in range(self.interface.chains):
            rows = (i * part.batch, (i + 1) * part.batch)
            cut = {
                names[name]: self._matrices(f"chain_{i}/{name}", whole, rows)
                for name, whole in wholes.items()
            }
            self.graph.inline(inner.graph, f"chain_{i}/", cut)
        return {port.name: self._rejoined(port, results[port.name]) for port in program.outputs}

    def _matrices(self, name: str, whole: str, span: tuple[int, int]) -> str:
        shape = self.graph.shape(whole)
        shape[1] = span[1] - span[0]
        bounds = [self._indices((value,)) for value in (*span, 1)]
        return self.graph.node("Slice", [whole, *bounds], f"{name}/given", shape, self.graph.element(whole))

    def _rejoined(self, port: Port, result: Value) -> Value:
        grid, shape, names = self.grid(port.tensor), self.shape(port.tensor), []
        for name, plane in zip(self.plane_names(port.tensor), result.planes, strict=True):
            parts = [f"chain_{i}/{plane}" for i in range(self.interface.chains)]
            names.append(self.joined(name, parts, self.axis_of(Axis.BLOCKS), shape, grid))
        return Value(names[0], port.tensor, low="".join(names[1:]))

    @property
    def entry_type(self) -> InputType:
        """Type of what `entry` returns."""
        return self.interface.input_type

    def entry(self, tensor: str, name: str) -> str:
        """Return what chains take their matrices from, of an input of the graph."""
        return self.reshaped(name, f"{tensor}/folded", self.shape(tensor))

    def reshaped(self, tensor: str, name: str, shape: Sizes) -> str:
        """Return a tensor with other axes, or itself where it has them."""
        if self.batch is None or self.graph.shape(tensor) == shape:
            return tensor
        sizes = self.graph.initializer(f"shape/{'x'.join(map(str, shape))}", np.array(shape, dtype=np.int64))
        return self.graph.node("Reshape", [tensor, sizes], name, shape, self.graph.element(tensor))

    def _end(self, port: Port, result: Value, name: str, inputs: Mapping[str, str]) -> None:
        """Append an output in float32; T of what an inverse returns."""
        if port.meaning not in (Meaning.STRICT_INVERSE, Meaning.FACTORED_INVERSE):
            self.finish(name, self.plain(result))
        elif self._is_inverse(result):
            self.finish(name, result)
        else:
            strict, result, shape = f"{name}/strictly_lower", self.plain(result), self.shape(port.tensor)
            beta = self.plan.program.inverse_ports.beta
            if beta is None:
                self.finish(strict, result)
            else:
                factored = self.finish(f"{name}/factored", result)
                self.graph.node("Mul", [factored, inputs[beta]], strict, shape)
            self.graph.node("Add", [strict, self.identity_matrix()], name, shape)

    def _is_inverse(self, result: Value) -> bool:
        """Whether the integers of the result are those of T, and its diagonal dequantizes to 1.0 exactly."""
        if result.ones is None or self.plan.program.inverse_ports.factored:
            return False
        grid, integer = self.grid(result.tensor), self.one_of(result.tensor)
        one = scalar.dequantize_scalar(integer, grid.scale, grid.format)
        return one == 1.0 and np.array_equal(result.ones, np.eye(self.plan.chunk, dtype=np.bool_))

    def _turned(self, given: str, vector: str, axis: Axis) -> str:
        if axis == Axis.ROWS:
            return given
        shape = self.shape(vector_name(vector, axis))
        return self.graph.node("Transpose", [given], f"{vector}/transposed", shape, perm=TRANSPOSED)
