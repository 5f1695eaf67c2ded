"""What a graph takes and returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, cast

import onnx

from qinvert.checks import check_integer
from qinvert.errors import ExportError
from qinvert.export.graph import Sizes
from qinvert.plan.plan import LayerPlan
from qinvert.profiles import Profile
from qinvert.program.steps import BETA

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


class GraphInput(StrEnum):
    """What a graph starts from."""

    #: The matrices L.
    L = "L"
    #: M = -L, which saves the sign flip.
    M = "M"
    #: Unit keys, beta and log decays; the graph builds L from them in float32.
    KEYS = "keys"


class GraphOutput(StrEnum):
    """What a graph returns."""

    #: T in float32.
    T = "T"
    #: The integers of the program's result, as they are stored, for integer products that follow.
    INTEGERS = "integers"


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

    def __post_init__(self) -> None:
        if self.batch is not None:
            check_integer("batch", self.batch, 1, MAX_BATCH, ExportError, "; pass the matrices per call")
        for name, kind in (("input", GraphInput), ("output", GraphOutput)):
            given = getattr(self, name)
            if not isinstance(given, str) or given not in list(kind):
                raise ExportError(f"{name} {given!r} is unknown; use {' or '.join(kind)}")
            object.__setattr__(self, name, kind(given))
        if self.input is GraphInput.KEYS:
            hint = "; pass the length of a key, for example 128"
            check_integer("key_size", self.key_size, 1, MAX_KEY_SIZE, ExportError, hint)
        elif self.key_size is not None:
            raise ExportError(f"key_size {self.key_size!r} is for input='keys' only; leave it out")

    @staticmethod
    def of(model: onnx.ModelProto, plan: LayerPlan) -> Interface:
        """Return what a graph takes and returns, if it is one of this package's for the plan.

        Raises
        ------
        ExportError
            If it is not.
        """
        given = {value.name: _static_shape(value) for value in model.graph.input}
        returned = {value.name: _static_shape(value) for value in model.graph.output}
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
                output=GraphOutput.INTEGERS if _returns_integers(model) else GraphOutput.T,
            )
            fits = list(given.items()) == list(found.inputs(plan).items())
            fits = fits and returned == {found.output_name(plan): found.square(plan)}
        except ExportError as error:
            raise ExportError(
                f"the graph takes {given} and returns {returned}: {error}; export again"
            ) from None
        if not fits:
            wanted = " and ".join(["L or M", *plan.program.vectors])
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

    def inputs(self, plan: LayerPlan) -> dict[str, Sizes]:
        """Shape of every input by its name, in order."""
        column: Sizes = [1, self.count, plan.chunk, 1]
        if self.input is GraphInput.KEYS:
            assert self.key_size is not None
            keys: Sizes = [1, self.count, plan.chunk, self.key_size]
            return {KEYS: keys, BETA: column, LOG_DECAY: column}
        return {str(self.input): self.square(plan)} | dict.fromkeys(plan.program.vectors, column)

    def output_name(self, plan: LayerPlan) -> str:
        """``T``; for integers what ``T = I + S`` or ``T = I + beta W`` calls the program's result.

        Raises
        ------
        ExportError
            If the integers have two planes.
        """
        if self.output is GraphOutput.T:
            return "T"
        if plan.output.format.planes > 1:
            raise ExportError(
                f"output='integers' needs one tensor, the plan's result is {plan.output.format} with "
                f"{plan.output.format.planes}; use output='T' or calibrate with other bits"
            )
        if not plan.program.implicit_identity:
            return "T"
        return "W" if plan.program.vectors else "S"

    def element(self, plan: LayerPlan, profile: Profile) -> str:
        """NumPy name of the output's type."""
        integers = self.output is GraphOutput.INTEGERS
        return profile.storage_of(plan.output.format).element if integers else "float32"

    def square(self, plan: LayerPlan) -> Sizes:
        """Shape of L and of the output."""
        return [1, self.count, plan.chunk, plan.chunk]

    def metadata(self, plan: LayerPlan, zero_point: int) -> Mapping[str, str]:
        """Return what a user of the graph needs to know about its ends."""
        found = {"qinvert.input": str(self.input), "qinvert.output": str(self.output)}
        if self.output is GraphOutput.INTEGERS:
            name = self.output_name(plan)
            real = f"scale ({name} - zero_point)" if zero_point else f"scale {name}"
            found["qinvert.output_scale"] = repr(plan.output.scale)
            found["qinvert.output_zero_point"] = str(zero_point)
            found["qinvert.output_meaning"] = f"T = {PREFIXES.get(name, '')}{real}"
        return found


def _static_shape(value: onnx.ValueInfoProto) -> Sizes:
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims]


def _returns_integers(model: onnx.ModelProto) -> bool:
    return any(value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT for value in model.graph.output)


#: What stands before the program's result in T, by the result's name.
PREFIXES: Final = {"S": "I + ", "W": "I + max(beta, 2^-14) "}
