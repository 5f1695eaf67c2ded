"""What a graph takes and returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, cast

import onnx

from qinvert.checks import check_integer, check_member
from qinvert.errors import ExportError
from qinvert.export.graph import Sizes
from qinvert.export.options import AUTO as AUTO
from qinvert.export.options import STEP_OPTIONS as STEP_OPTIONS
from qinvert.export.options import GraphInput as GraphInput
from qinvert.export.options import GraphOutput as GraphOutput
from qinvert.export.options import InputType as InputType
from qinvert.export.options import Options as Options
from qinvert.formats import IntFormat
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.profiles import Profile
from qinvert.program.ports import BETA, Port

#: Largest batch: more matrices than that overflow a graph's constants.
MAX_BATCH: Final = 65536
#: Largest input that a graph may ask for.
MAX_ELEMENTS: Final = 2**28
#: Longest key; models use 64 to 256.
MAX_KEY_SIZE: Final = 4096
#: Names of the inputs that L is built from: keys, strengths, log decays.
KEYS: Final = "k"
LOG_DECAY: Final = "g"
#: Name of a batch that is not fixed.
ANY_BATCH: Final = "batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """Inputs and outputs of a graph.

    Raises
    ------
    ExportError
        At construction, for an illegal option.
    """

    #: Matrices per call; None leaves it to the caller (functions of a larger model only).
    batch: int | None = 8
    input: GraphInput = GraphInput.L
    #: Length of a key, for `GraphInput.KEYS` only.
    key_size: int | None = None
    output: GraphOutput = GraphOutput.T
    input_type: InputType = InputType.FLOAT32
    #: Independent parts of the batch in one graph: element by element, what one chain does can run
    #: beside products of another.
    chains: int = 1

    def __post_init__(self) -> None:
        if self.batch is not None:
            check_integer("batch", self.batch, 1, MAX_BATCH, ExportError, "; pass the matrices per call")
        for name, kind in (("input", GraphInput), ("output", GraphOutput), ("input_type", InputType)):
            object.__setattr__(self, name, check_member(kind, name, getattr(self, name), ExportError))
        if self.input is GraphInput.KEYS:
            hint = "; pass the length of a key, for example 128"
            check_integer("key_size", self.key_size, 1, MAX_KEY_SIZE, ExportError, hint)
        elif self.key_size is not None:
            raise ExportError(f"key_size {self.key_size!r} is for input='keys' only; leave it out")
        self._check_input_type()
        self._check_chains()
        if self.output is not GraphOutput.INTEGERS:
            ports = self.input is GraphInput.PORTS
            if ports != (self.output is GraphOutput.PORTS):
                raise ExportError(
                    f"input {str(self.input)!r} does not go with output {str(self.output)!r}; inverses "
                    "return 'T', other programs return their 'ports', and both can return 'integers'"
                )

    def _check_input_type(self) -> None:
        if self.input_type is InputType.INTEGERS and self.input not in (GraphInput.M, GraphInput.PORTS):
            raise ExportError(
                f"input_type 'integers' needs input='M', not {str(self.input)!r}: only M is a tensor of the "
                "program; pass the integers of -L, or leave input_type out"
            )

    def _check_chains(self) -> None:
        check_integer("chains", self.chains, 1, MAX_BATCH, ExportError, "; or 'auto'")
        if self.batch is None and self.chains > 1:
            raise ExportError(f"chains {self.chains} needs a batch that is fixed; pass batch, or chains=1")
        if self.batch is not None and self.batch % self.chains:
            raise ExportError(
                f"batch {self.batch} cannot be cut into {self.chains} chains of equal size; "
                "choose a divisor of the batch"
            )

    @staticmethod
    def of(model: onnx.ModelProto, plan: QuantizedProgram) -> Interface:
        """Return what a graph takes and returns, if it is one of this package's for the plan.

        Raises
        ------
        ExportError
            If it is not.
        """
        given = {value.name: static_shape(value) for value in model.graph.input}
        returned = {value.name: static_shape(value) for value in model.graph.output}
        first = next(iter(given), "")
        source = GraphInput.KEYS if first == KEYS else GraphInput.M if first == "M" else GraphInput.L
        shape = given.get(first, [])
        batch, key_size = (shape[1], shape[3]) if len(shape) == 4 else (0, 0)
        widest = max(plan.chunk, key_size if isinstance(key_size, int) else 0)
        most = min(MAX_BATCH, MAX_ELEMENTS // (plan.chunk * widest))
        try:
            found = Interface(
                batch=check_integer("batch of the graph", batch, 1, most, ExportError),
                input=source,
                key_size=cast("int", key_size) if source is GraphInput.KEYS else None,
                output=GraphOutput.INTEGERS if _are_integers(model.graph.output) else GraphOutput.T,
                input_type=InputType.INTEGERS if _are_integers(model.graph.input) else InputType.FLOAT32,
            )
            fits = list(given.items()) == list(found.inputs(plan).items())
            fits = fits and returned == found.outputs(plan)
        except ExportError as error:
            raise ExportError(
                f"the graph takes {given} and returns {returned}: {error}; export again"
            ) from None
        if not fits:
            wanted = " and ".join(["L or M", *plan.program.vector_inputs])
            raise ExportError(
                f"the graph has no input {wanted} and output T of {plan.chunk} x {plan.chunk} "
                f"matrices, nor keys or integers: it takes {given} and returns {returned}; pass a file that "
                "qinvert exported"
            )
        return found

    @property
    def count(self) -> int | str:
        """Size of the batch axis."""
        return ANY_BATCH if self.batch is None else self.batch

    def inputs(self, plan: QuantizedProgram) -> dict[str, Sizes]:
        """Shape of every input by its name, in order.

        Raises
        ------
        ExportError
            If the program does not have such inputs.
        """
        self._check_ports(plan)
        if self.input is GraphInput.PORTS:
            return {port.name: self.sizes(port) for port in plan.program.inputs}
        column: Sizes = [1, self.count, plan.chunk, 1]
        if self.input is GraphInput.KEYS:
            assert self.key_size is not None
            keys: Sizes = [1, self.count, plan.chunk, self.key_size]
            return {KEYS: keys, BETA: column, LOG_DECAY: column}
        beta = plan.program.inverse_ports.beta
        return {str(self.input): self.square(plan)} | ({} if beta is None else {beta: column})

    def outputs(self, plan: QuantizedProgram) -> dict[str, Sizes]:
        """Shape of every output by its name, in order."""
        names = self.output_names(plan)
        return {names[port.name]: self.sizes(port) for port in plan.program.outputs}

    def output_names(self, plan: QuantizedProgram) -> dict[str, str]:
        """What the graph calls every output port.

        An inverse returns ``T``, or integers as ``S`` of ``T = I + S`` or ``W``
        of ``T = I + beta W``; an output with the name of an input is called
        ``NAME_out``.

        Raises
        ------
        ExportError
            If integers have two planes.
        """
        self._check_ports(plan)
        if self.output is GraphOutput.INTEGERS:
            for port in plan.program.outputs:
                _check_planes(plan.tensors[port.tensor].format)
        if self.output is GraphOutput.T:
            return {port.name: "T" for port in plan.program.outputs}
        taken = {port.name for port in plan.program.inputs}
        return {
            port.name: f"{port.name}_out" if port.name in taken else port.name
            for port in plan.program.outputs
        }

    def end_names(self, plan: QuantizedProgram) -> set[str]:
        """Names of the graph's inputs and outputs, which no tensor between them may have."""
        return {*(port.name for port in plan.program.inputs), *self.output_names(plan).values()}

    def result_names(self, plan: QuantizedProgram) -> dict[str, str]:
        """What the graph calls every output, by the tensor of the program that holds it."""
        names = self.output_names(plan)
        return {port.tensor: names[port.name] for port in plan.program.outputs}

    def output_name(self, plan: QuantizedProgram) -> str:
        """What the graph calls the result of an inverse."""
        (name,) = self.output_names(plan).values()
        return name

    def part(self, input_type: InputType) -> Interface:
        """What one chain takes and returns: its share of the batch."""
        assert self.batch is not None
        ports = self.input is GraphInput.PORTS
        return Interface(
            batch=self.batch // self.chains,
            input_type=input_type,
            input=GraphInput.PORTS if ports else GraphInput.M,
            output=GraphOutput.PORTS if ports else GraphOutput.T,
        )

    def sizes(self, port: Port) -> Sizes:
        """Shape of a port in the graph."""
        _, rows, columns = port.shape
        return [1, self.count, rows, columns]

    def _check_ports(self, plan: QuantizedProgram) -> None:
        ports = self.input is GraphInput.PORTS
        if ports == plan.program.is_inverse:
            given = "computes an inverse" if ports else "does not compute an inverse"
            legal = [kind for kind in GraphInput if (kind is GraphInput.PORTS) is not ports]
            raise ExportError(
                f"{plan.program.title} {given}, so that input {str(self.input)!r} does not fit; "
                f"use {' or '.join(legal)}"
            )

    def input_elements(self, plan: QuantizedProgram, profile: Profile) -> dict[str, str]:
        """NumPy name of the type of every input."""
        found = dict.fromkeys(self.inputs(plan), "float32")
        integers = self.integer_inputs(plan)
        return found | {name: profile.end_of(plan.tensors[name].format).element for name in integers}

    def elements(self, plan: QuantizedProgram, profile: Profile) -> dict[str, str]:
        """NumPy name of the type of every output."""
        integers = self.output is GraphOutput.INTEGERS
        return {
            name: profile.end_of(plan.tensors[tensor].format).element if integers else "float32"
            for tensor, name in self.result_names(plan).items()
        }

    def _input_metadata(self, plan: QuantizedProgram, profile: Profile) -> dict[str, str]:
        found = {"qinvert.chains": str(self.chains)} if self.chains > 1 else {}
        if self.input_type is not InputType.INTEGERS:
            return found
        found["qinvert.input_type"] = str(self.input_type)
        for name in self.integer_inputs(plan):
            grid = plan.tensors[name]
            # An inverse has one matrix: no name is needed.
            suffix = "" if plan.program.is_inverse else f"/{name}"
            found[f"qinvert.input_scale{suffix}"] = repr(grid.scale)
            found[f"qinvert.input_zero_point{suffix}"] = str(profile.end_of(grid.format).zero_point)
        return found

    def integer_inputs(self, plan: QuantizedProgram) -> tuple[str, ...]:
        """Inputs that the graph takes as integers.

        Raises
        ------
        ExportError
            If the integers of one have two planes, or if the graph divides M by beta.
        """
        if self.input_type is not InputType.INTEGERS:
            return ()
        if plan.program.is_inverse and plan.program.inverse_ports.factored:
            raise ExportError(
                f"input_type 'integers' does not fit {plan.program.title}: the graph divides M by beta in "
                "float32; leave input_type out, or calibrate without factored"
            )
        vectors = plan.program.vector_inputs
        names = tuple(port.name for port in plan.program.inputs if port.name not in vectors)
        for name in names:
            _check_planes(plan.tensors[name].format, "input_type", name)
        return names

    @property
    def has_integer_ends(self) -> bool:
        """Whether the graph takes and returns integers only."""
        return self.input_type is InputType.INTEGERS and self.output is GraphOutput.INTEGERS

    def square(self, plan: QuantizedProgram) -> Sizes:
        """Shape of L and of the output."""
        return [1, self.count, plan.chunk, plan.chunk]

    def metadata(self, plan: QuantizedProgram, profile: Profile) -> Mapping[str, str]:
        """Return what a user of the graph needs to know about its ends."""
        found = {
            "qinvert.input": str(self.input),
            "qinvert.output": str(self.output),
            **self._input_metadata(plan, profile),
        }
        if self.output is not GraphOutput.INTEGERS:
            return found
        for tensor, name in self.result_names(plan).items():
            grid = plan.tensors[tensor]
            zero_point = profile.end_of(grid.format).zero_point
            # An inverse has one output: no name is needed.
            suffix = "" if plan.program.is_inverse else f"/{name}"
            real = f"scale ({name} - zero_point)" if zero_point else f"scale {name}"
            found[f"qinvert.output_scale{suffix}"] = repr(grid.scale)
            found[f"qinvert.output_zero_point{suffix}"] = str(zero_point)
            if plan.program.is_inverse:
                found["qinvert.output_meaning"] = f"T = {PREFIXES.get(name, '')}{real}"
        return found


def _check_planes(fmt: IntFormat, option: str = "output", tensor: str = "result") -> None:
    if fmt.planes > 1:
        raise ExportError(
            f"{option}='integers' needs one tensor, but the plan's {tensor} is {fmt} with {fmt.planes} "
            f"planes; leave {option} out or calibrate with other bits"
        )


def static_shape(value: onnx.ValueInfoProto) -> Sizes:
    """Declared sizes of an input or output; a name or ``"?"`` where one is open."""
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims]


def _are_integers(values: Iterable[onnx.ValueInfoProto]) -> bool:
    return any(value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT for value in values)


#: What stands before the program's result in T, by the result's name.
PREFIXES: Final = {"S": "I + ", "W": "I + max(beta, 2^-14) "}
