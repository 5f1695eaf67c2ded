"""Ports: the named inputs and outputs of a program, each with a shape and a meaning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from qinvert.errors import ProgramError
from qinvert.program.steps import MAX_CHUNK, MAX_NAME, Shape

#: Largest number of inputs, and of outputs, of a program; the whole chunk step has six and two.
MAX_PORTS: Final = 64
#: Largest number of elements of a port: that of the largest M.
MAX_ELEMENTS: Final = MAX_CHUNK**2


class Meaning(StrEnum):
    """What a port holds, as far as code outside the program needs to know."""

    #: Any matrix; the program's documentation says what it is.
    TENSOR = "tensor"
    #: A matrix whose columns are tokens and whose rows are channels; other layouts are `TENSOR`.
    CHANNELS_FIRST = "channels_first"
    #: ``M = -L``, strictly lower triangular, ``[C, C]``.
    MATRIX = "matrix"
    #: ``K = M / max(beta, 2^-14)``, row by row, strictly lower triangular, ``[C, C]``.
    QUOTIENT = "quotient"
    #: ``max(beta, 2^-14)``, one number per row, ``[C, 1]``.
    BETA = "beta"
    #: ``T = (I - M)^-1``, ``[C, C]``.
    INVERSE = "inverse"
    #: ``S = T - I``, strictly lower triangular, ``[C, C]``.
    STRICT_INVERSE = "strict_inverse"
    #: ``W = (T - I) / max(beta, 2^-14)``, row by row, strictly lower triangular, ``[C, C]``.
    FACTORED_INVERSE = "factored_inverse"

    @property
    def strictly_lower(self) -> bool:
        """Whether the diagonal and all above it are zero, whatever the data are."""
        return self in (Meaning.MATRIX, Meaning.QUOTIENT, Meaning.STRICT_INVERSE, Meaning.FACTORED_INVERSE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """One input or output of a program: one matrix for every member of a batch.

    Raises
    ------
    ProgramError
        At construction, for a name or a shape that is not legal.
    """

    #: Name by which values are passed in and returned.  An input and an output may share it.
    name: str
    #: ``[1, rows, columns]``.
    shape: Shape
    meaning: Meaning = Meaning.TENSOR
    #: Tensor of the program that an output returns; the tensor of an input has the port's name.
    tensor: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", Shape(*self.shape))
        object.__setattr__(self, "tensor", self.tensor or self.name)
        check_name(self.name)
        blocks, rows, columns = self.shape
        if blocks != 1 or rows < 1 or columns < 1 or math.prod(self.shape) > MAX_ELEMENTS:
            raise ProgramError(
                f"port {self.name!r} has the shape {self.shape}; a port is one block of at most "
                f"{MAX_ELEMENTS} elements; cut or stack blocks by steps of the program"
            )

    def __str__(self) -> str:
        return f"{self.name} [{self.shape.rows}, {self.shape.columns}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class InversePorts:
    """The tensors behind the ports of a program that computes an inverse."""

    #: Tensor of M, or of K where beta is a separate input.
    matrix: str
    #: Tensor of beta; None where the program does not take it.
    beta: str | None
    #: Tensor of the result.
    result: str
    #: What the result is: T, S or W.
    form: Meaning

    @property
    def factored(self) -> bool:
        """Whether the program takes K and beta, and returns W."""
        return self.beta is not None

    @property
    def holds_identity(self) -> bool:
        """Whether the result is T itself, so that nothing must be added to it."""
        return self.form is Meaning.INVERSE


#: Names of the ports of inverses.
MATRIX: Final = "M"
BETA: Final = "beta"
RESULTS: Final = {Meaning.INVERSE: "T", Meaning.STRICT_INVERSE: "S", Meaning.FACTORED_INVERSE: "W"}


def inverse_inputs(chunk: int, factored: bool = False) -> tuple[Port, ...]:
    """Return the inputs of an inverse: ``M``, or ``M`` (which holds K) and ``beta`` if it is factored."""
    meaning = Meaning.QUOTIENT if factored else Meaning.MATRIX
    matrix = Port(name=MATRIX, shape=Shape(1, chunk, chunk), meaning=meaning)
    if not factored:
        return (matrix,)
    return (matrix, Port(name=BETA, shape=Shape(1, chunk, 1), meaning=Meaning.BETA))


def inverse_output(chunk: int, tensor: str, form: Meaning = Meaning.STRICT_INVERSE) -> Port:
    """Return the output of an inverse, called ``S``, ``W`` or ``T`` after what it is."""
    return Port(name=RESULTS[form], shape=Shape(1, chunk, chunk), meaning=form, tensor=tensor)


def find_inverse_ports(
    inputs: tuple[Port, ...], outputs: tuple[Port, ...], chunk: int
) -> InversePorts | None:
    """Return the tensors of an inverse if these are its ports, else None."""
    if len(outputs) != 1 or outputs[0].meaning not in RESULTS:
        return None
    (output,) = outputs
    factored = output.meaning is Meaning.FACTORED_INVERSE
    if inputs != inverse_inputs(chunk, factored) or output != inverse_output(
        chunk, output.tensor, output.meaning
    ):
        return None
    return InversePorts(
        matrix=MATRIX, beta=BETA if factored else None, result=output.tensor, form=output.meaning
    )


def check_name(name: str) -> None:
    """Refuse a name that graphs and tables cannot show.

    Raises
    ------
    ProgramError
        With the name and the legal length.
    """
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise ProgramError(
            f"name {name[:MAX_NAME]!r} has {len(name)} characters; use 1 to {MAX_NAME}, all printable"
        )
