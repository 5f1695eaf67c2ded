"""The type that every method module fills in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from qinvert.errors import ProgramError
from qinvert.program.program import Program

#: Programs for matrices of the size ``chunk``, in the order in which the planner meets them.
Candidates: TypeAlias = Callable[[int], tuple[Program, ...]]
#: Like `Candidates`, but of the factored form: ``(chunk, free_residuals)``.  A residual term is free
#: if it is not an operand of its product; without ``free_residuals`` no program may have one.
FactoredCandidates: TypeAlias = Callable[[int, bool], tuple[Program, ...]]

#: What callers write if the planner may choose the method.
AUTO: Final = "auto"
#: Rank of methods that do not give one: they come last, in the order of their names.
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
    #: Programs from which the planner chooses if a caller names this method.
    candidates: Candidates
    #: Programs that it adds to the choice if no method is named; None if it adds nothing.
    automatic: Candidates | None = None
    #: Programs that it adds instead on chips whose costs are known (`qinvert.hardware`), if no method
    #: is named; None if they are those of `automatic`.
    on_chips: Candidates | None = None
    #: Programs that it adds if they must take beta as a separate input, whether this
    #: method is named or no method is; None if it has no such form.
    factored: FactoredCandidates | None = None
    #: Whether every product waits for the one before.  Such a method is a reference: it is not a
    #: candidate if no method is named.
    sequential: bool = False
    #: Place in lists of methods, ascending.  Sequential methods come last; equal ranks are in the
    #: order of names.
    rank: int = LAST
    #: Place of `automatic` and `factored` among those of other methods, in the same way.
    automatic_rank: int = LAST

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name == AUTO:
            raise ProgramError(
                f"method name {self.name!r} is not a Python name other than {AUTO!r}; rename it"
            )
        if getattr(self.build, "__name__", None) != self.name:
            raise ProgramError(f"method {self.name!r} is built by {self.build!r}; give both the same name")
        if self.sequential and (self.automatic or self.on_chips or self.factored):
            raise ProgramError(
                f"method {self.name!r} is sequential, and the planner never chooses such a method unasked; "
                "leave out automatic, on_chips and factored, or sequential"
            )
