"""What a graph takes and returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from qinvert.checks import check_integer
from qinvert.errors import ExportError
from qinvert.export.graph import Sizes
from qinvert.plan import LayerPlan
from qinvert.steps import BETA

#: Largest batch: more matrices than that overflow a graph's constants.
MAX_BATCH: Final = 65536
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


#: What stands before the program's result in T, by the result's name.
PREFIXES: Final = {"S": "I + ", "W": "I + max(beta, 2^-14) "}
