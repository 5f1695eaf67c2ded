"""Statements of a kernel as data: what each defines, reads and does.

Text comes last: `rendered` writes the statements when they are in their final
order, and no code reads that text back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from qinvert.errors import ProgramError
from qinvert.kernels.tiles import Position


@dataclass(frozen=True, slots=True, kw_only=True)
class Expression:
    """Triton text that knows which variables it reads.

    Raises
    ------
    ProgramError
        If the template does not have one place for every variable.
    """

    #: The text, with ``{}`` in the place of every variable.
    template: str
    #: Names of those variables in order; one that is read twice occurs twice.
    reads: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        places = self.template.count("{}")
        if places != len(self.reads):
            raise ProgramError(f"{self.template!r} has {places} places for {len(self.reads)} variables")

    @property
    def text(self) -> str:
        """The text with the names of the variables."""
        return self.template.format(*self.reads)

    def renamed(self, names: Mapping[str, str]) -> Expression:
        """Return the expression with other names for the variables that ``names`` has."""
        return Expression(template=self.template, reads=tuple(names.get(name, name) for name in self.reads))


#: A part of an expression: another expression, the name of a scalar, a type, or a number.
Operand: TypeAlias = Expression | str | float


def expression(template: str, *operands: Operand) -> Expression:
    """Return ``template`` with an operand in the place of every ``{}``; it reads all that they read."""
    parts = [part if isinstance(part, Expression) else Expression(template=str(part)) for part in operands]
    return Expression(
        template=template.format(*(part.template for part in parts)),
        reads=tuple(name for part in parts for name in part.reads),
    )


def variable(name: str) -> Expression:
    """Return the expression that is one variable."""
    return Expression(template="{}", reads=(name,))


def summed(terms: Sequence[Expression]) -> Expression:
    """Return the sum of ``terms`` as one expression."""
    return expression(" + ".join("{}" for _ in terms), *terms)


class Kind(Enum):
    """What a statement does, as far as other code needs to know."""

    #: Multiplies two tiles.
    PRODUCT = auto()
    #: Converts a variable to the type of a product's operands.
    CONVERSION = auto()
    #: Defines another value of that type.
    OPERAND = auto()
    #: Anything else; values that depend on M are float32.
    OTHER = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """``variable = expression``, or a call."""

    #: Name of the variable that it defines; empty for a call.
    variable: str = ""
    #: What the variable is, or the call.
    expression: Expression
    #: What it does.
    kind: Kind = Kind.OTHER
    #: Position of the tile of M that it loads; None if it does not load any.
    position: Position | None = None
    #: Number of loops around it.
    depth: int = 0

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the variables that it reads."""
        return self.expression.reads

    @property
    def text(self) -> str:
        """Its line of the source, without the indentation of the function."""
        assigned = f"{self.variable} = " if self.variable else ""
        return f"{'    ' * self.depth}{assigned}{self.expression.text}"


def rendered(statements: Sequence[Statement]) -> list[str]:
    """Return the lines of statements in their final order.

    Raises
    ------
    ProgramError
        If a statement reads a variable that no statement before it defines.
    """
    defined: set[str] = set()
    for statement in statements:
        unknown = [name for name in statement.reads if name not in defined]
        if unknown:
            raise ProgramError(f"statement {statement.text!r} reads {unknown[0]}, which is not defined yet")
        if statement.variable:
            defined.add(statement.variable)
    return [statement.text for statement in statements]
