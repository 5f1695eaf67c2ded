"""What a caller may choose about plans of the whole chunk step."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from qinvert.checks import check_flag, check_magnitude, check_member
from qinvert.chunk_step.form import Form
from qinvert.errors import PlanError
from qinvert.formats import FLOAT32, NARROW_BITS
from qinvert.methods import AUTO

#: Bits of a value that is wide.
WIDE_BITS: Final = 16


class Scope(StrEnum):
    """How much of a layer a plan holds."""

    #: T alone: what every family shares, and what other tools can call.
    INVERSE = "inverse"
    #: The whole chunk step, from keys, values and the state to outputs and the next state.
    CHUNK = "chunk"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkOptions:
    """Options of ``scope="chunk"``.

    Raises
    ------
    PlanError
        At construction, for a value that is not legal.
    """

    #: Where beta and decays enter, see `qinvert.chunk_step.form.Form`.
    form: Form = Form.FOLDED
    #: Whether values are held transposed, so that they are the left operands of products.
    values_first: bool = True
    #: Whether the last level of the inverse is applied to values.
    halves: bool = False
    #: Width of values: 8, 16 or "auto", which gives more than 8 bits where the goal asks for it.
    value_bits: int | str = AUTO
    #: The same for the state that goes from chunk to chunk; or "float32", which is carried as it is: decays
    #: and what is added to it are integers, and products read it on a grid of its own.
    state_bits: int | str = AUTO
    #: Tensors of 8 bits that are held in 4, by their names in the program, each with all that share its grid.
    int4: tuple[str, ...] = ()
    #: Whether the state is carried in 16 bits and read in 8 by products, so that what rounding loses stays
    #: in the state: the error feedback of a state of 8 bits.
    error_feedback: bool = False
    #: Times the largest state that the data show, for the grid on which it is carried, or on which products
    #: read it where it is carried in float32; None means 4 for more than 8 bits, else 1.
    state_margin: float | None = None
    #: Whether value channels are divided by powers of two; None takes what serves the sample best.
    equalize: bool | None = None
    #: Whether values are multiplied by Hadamard's matrix.
    rotate: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "form", check_member(Form, "form", self.form, PlanError))
        if self.halves and self.form is Form.WY:
            raise PlanError("halves applies T to one tensor, but form 'wy' has two; use 'folded' or 'state'")
        for name in ("value_bits", "state_bits"):
            legal = (AUTO, NARROW_BITS, WIDE_BITS, *((FLOAT32.name,) if name == "state_bits" else ()))
            if (given := getattr(self, name)) not in legal:
                *others, last = map(str, legal)
                raise PlanError(f"{name} {given!r} is unknown; use {', '.join(others)} or {last}")
        if not isinstance(self.int4, tuple) or not all(isinstance(name, str) for name in self.int4):
            raise PlanError(
                f"int4 {self.int4!r} is no tuple of names; pass those of tensors, such as ('D', 'T')"
            )
        check_flag("error_feedback", self.error_feedback, PlanError)
        if self.error_feedback and self.state_bits == NARROW_BITS:
            raise PlanError(
                "error_feedback carries the state in 16 bits and reads it in 8, so that it does not go with "
                "state_bits=8; leave one of them out"
            )
        if self.error_feedback and self.float_state:
            raise PlanError(
                "error_feedback is for a state of 16 bits; a state in float32 loses nothing that could be "
                "fed back, so leave error_feedback out"
            )
        hint = "pass at least 1, such as 4 for contexts longer than the data"
        margin = self.state_margin
        if margin is not None and check_magnitude("state_margin", margin, PlanError, hint) < 1:
            raise PlanError(f"state_margin {margin!r} is below 1; {hint}")
        if self.rotate and self.equalize:
            raise PlanError("rotate mixes the channels that equalize scales; leave one of them out")

    @property
    def float_state(self) -> bool:
        """Whether the state is carried in float32."""
        return self.state_bits == FLOAT32.name

    @property
    def reads_apart(self) -> bool:
        """Whether products read the state on another grid than the one that carries it."""
        return self.error_feedback or self.float_state
