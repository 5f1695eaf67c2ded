"""The type that every method module fills in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from qinvert.errors import ProgramError
from qinvert.program.program import Program

#: Programs for matrices of the size ``chunk``, in the order in which the planner meets them.
Candidates: TypeAlias = Callable[[int], tuple[Program, ...]]
#: As `Candidates`, of the factored form: ``(chunk, free_residuals)``.  A residual term is free
#: if it is not an operand of its product; without ``free_residuals`` no program may have one.
FactoredCandidates: TypeAlias = Callable[[int, bool], tuple[Program, ...]]

#: What callers write where any method will do.
AUTO: Final = "auto"
#: Methods that say nothing about their rank come after those that do, by name.
LAST: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One algorithm: how its programs are built, and which of them the planner weighs.

    Raises
    ------
    ProgramError
        At construction, naming the field and what fits.
    """

    #: Name in calls, plans and tables: that of the function and of its programs.
    name: str
    #: ``build(chunk, ...)``; every argument but the first has a default.
    build: Callable[..., Program]
    #: What the planner chooses from where this method is named.
    candidates: Candidates
    #: What it adds to the choice where no method is named; None if nothing.
    automatic: Candidates | None = None
    #: What it adds where programs must take beta as an input of their own, whether this
    #: method is named or none is; None if it has no such form.
    factored: FactoredCandidates | None = None
    #: Every product waits for the one before: a reference, and no candidate where none is named.
    sequential: bool = False
    #: Place in lists of methods, ascending; sequential ones come last, equal ones by name.
    rank: int = LAST
    #: Place of `automatic` and `factored` among those of other methods, likewise.
    automatic_rank: int = LAST

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name == AUTO:
            raise ProgramError(
                f"method name {self.name!r} is not a Python name other than {AUTO!r}; rename it"
            )
        if getattr(self.build, "__name__", None) != self.name:
            raise ProgramError(f"method {self.name!r} builds by {self.build!r}; give both one name")
        if self.sequential and (self.automatic is not None or self.factored is not None):
            raise ProgramError(
                f"method {self.name!r} is sequential, which the planner never chooses by itself; "
                "leave out automatic and factored, or sequential"
            )
