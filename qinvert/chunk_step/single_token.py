"""A chunk step of one token on the grids of a longer one, for decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, TypeVar, cast

from qinvert.chunk_step._value_path import INVERSE_PREFIX
from qinvert.chunk_step.form import Decay
from qinvert.chunk_step.gated_delta_step import gated_delta_step
from qinvert.chunk_step.ports import BETA, NAME, step_bounds, step_sizes
from qinvert.errors import ProgramError
from qinvert.methods.elimination import elimination
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.ports import MATRIX
from qinvert.program.program import Program
from qinvert.program.residual_sums import residuals_as_sums
from qinvert.program.step_list import StepList

P = TypeVar("P", bound=QuantizedProgram)

#: Size of the smallest inverse that a program can have.
SMALLEST: Final = 2


def single_token_plan(plan: P) -> P | None:
    """Return the shortest chunk step on the grids of ``plan``, of which decoding uses the first token.

    A chunk with one token, all others with ``k = v = beta = g = 0``, has ``M = 0`` and T = I, and sums
    over tokens have one term.  So all integers are those of the longer step, and only what computes
    them becomes shorter: 2 rows in place of 64.

    Parameters
    ----------
    plan : QuantizedProgram
        Of a chunk step.

    Returns
    -------
    QuantizedProgram or None
        With all else that ``plan`` holds, such as its value channels;
        None where the program is not one of `gated_delta_step`, whose tensors are not known by name.

    Raises
    ------
    ProgramError
        If the program is not a chunk step.
    """
    program = single_token_program(plan.program)
    if program is None:
        return None
    # Everything inside the inverse is zero, on any grid.
    origins = {name: name if _is_outside(name) else MATRIX for name in program.tensors}
    return replace(plan, program=program, tensors={name: plan.tensors[o] for name, o in origins.items()})


def single_token_program(program: StepList) -> Program | None:
    """Return the shortest chunk step with the parameters of ``program``, for chunks with one token.

    Its tensors outside the inverse have the names of those of ``program``.

    Parameters
    ----------
    program : StepList
        A chunk step.

    Returns
    -------
    Program or None
        None where the program is not one of `gated_delta_step`, whose tensors are not known by name.

    Raises
    ------
    ProgramError
        If the program is not a chunk step.
    """
    if program.name != NAME:
        return None
    shortest = _shortest(program)
    if shortest is None or not {*filter(_is_outside, shortest.tensors)} <= {*program.tensors}:
        return None
    return shortest


def _is_outside(name: str) -> bool:
    return not name.startswith(INVERSE_PREFIX)


def _shortest(program: StepList) -> Program | None:
    sizes, parameters = step_sizes(program), program.parameters
    try:
        return gated_delta_step(
            residuals_as_sums(elimination(SMALLEST)),
            sizes.key_size,
            sizes.value_size,
            Decay.CHANNEL if sizes.per_channel else Decay.SCALAR,
            cast("str", parameters.get("form", "")),
            values_first=sizes.values_first,
            keys_first=sizes.keys_first,
            halves=bool(parameters.get("halves", False)),
            error_feedback=bool(parameters.get("error_feedback", False)),
            max_beta=step_bounds(program).get(BETA, 1.0),
        )
    except ProgramError:
        # A program that a caller built under the same name, with other parameters.
        return None
