"""Options of whole chunk steps, for the verb calibrate."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Final, TypeVar

import click

from qinvert.calibration.chunk_steps.options import ChunkOptions, Scope
from qinvert.chunk_step.form import Form
from qinvert.errors import InputError
from qinvert.formats import FLOAT32

F = TypeVar("F", bound=Callable[..., Any])

#: What may be typed.
SCOPES: Final = tuple(scope.value for scope in Scope)
BITS: Final = ("auto", "8", "16")
STATE_BITS: Final = (*BITS, FLOAT32.name)
FORMS: Final = tuple(form.value for form in Form)


class StepOptions:
    """What was typed of whole steps; an option that was left out is None."""

    def __init__(self, scope: str, given: dict[str, Any]) -> None:
        self.scope = scope
        self._given = {name: value for name, value in given.items() if value is not None}

    def chunk_options(self) -> ChunkOptions | None:
        """Return the options for the library, None for inverses.

        Raises
        ------
        InputError
            If an option of steps comes without ``--scope chunk``.
        PlanError
            If an option is not legal.
        """
        if self.scope != Scope.CHUNK:
            if self._given:
                name = next(iter(self._given)).replace("_", "-")
                shown = "no-equalize" if name == "equalize" else name
                raise InputError(f"--{shown} goes with --scope chunk; leave it out, or pass that scope")
            return None
        return ChunkOptions(**{name: _number(value) for name, value in self._given.items()})


def _number(value: Any) -> Any:
    """Return bits as a number, and any other value as it is."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


def step_options(function: F) -> F:
    """Add the options, and pass them on as ``steps``."""

    @wraps(function)
    def with_options(**arguments: Any) -> Any:
        scope = arguments.pop("scope")
        names = ("form", "value_bits", "state_bits", "state_margin", "error_feedback", "rotate", "equalize")
        given = {name: arguments.pop(name) for name in names}
        steps = StepOptions(scope, {**given, "int4": arguments.pop("int4") or None})
        return function(**arguments, steps=steps)

    options = (
        click.option(
            "--scope",
            default=Scope.INVERSE.value,
            show_default=True,
            type=click.Choice(SCOPES),
            help="T alone, or the whole chunk step of a model's layers, with the state.",
        ),
        click.option(
            "--form",
            type=click.Choice([form.value for form in Form]),
            help="Of a chunk step; folded by default.",
        ),
        click.option("--value-bits", type=click.Choice(BITS), help="Of values in a step; auto by default."),
        click.option("--state-bits", type=click.Choice(STATE_BITS), help="Of the state; auto by default."),
        click.option(
            "--int4",
            multiple=True,
            metavar="TENSOR",
            help="A tensor of 8 bits that is held in 4, such as T; repeat it for others.",
        ),
        click.option(
            "--state-margin",
            type=float,
            help="Room for the state: times what the data show.",
        ),
        click.option(
            "--error-feedback",
            is_flag=True,
            default=None,
            help="Carry the state in 16 bits, and read it in 8.",
        ),
        click.option("--rotate", is_flag=True, default=None, help="Multiply values by Hadamard's matrix."),
        click.option(
            "--no-equalize",
            "equalize",
            flag_value=False,
            default=None,
            type=bool,
            help="Do not divide channels of values by powers of two.",
        ),
    )
    for option in reversed(options):
        with_options = option(with_options)
    return with_options  # type: ignore[return-value]
