"""From L and beta to the inputs of a program, and from its output to T."""

from __future__ import annotations

import torch

from qinvert.errors import InputError
from qinvert.matrices import check_beta, divided, row_factors
from qinvert.program.program import Program
from qinvert.program.steps import BETA, INPUT


def needed_beta(
    program: Program, lower: torch.Tensor, beta: object, name: str = "beta"
) -> torch.Tensor | None:
    """Return the checked beta of checked matrices if ``program`` takes it, else None.

    Raises
    ------
    InputError
        If it is needed and missing, or not legal.
    """
    if not program.vectors:
        return None
    if beta is None:
        raise InputError(
            f"{program.title} divides the rows of L by {name}, which is missing; pass it with L, "
            f"shape {list(lower.shape[:-1])}"
        )
    return check_beta(beta, lower, name)


def program_inputs(
    program: Program, lower: torch.Tensor, beta: torch.Tensor | None, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the real value of every input for checked L and beta, the batch in one axis.

    ``M = -L``, or ``K = -L / max(beta, MIN_BETA)`` and that divisor where the
    program is factored, in float32 (float64 for ``dtype`` float64).
    """
    size = program.chunk
    if not program.vectors:
        return {INPUT: -lower.reshape(-1, size, size).to(dtype)}
    assert beta is not None
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    source, factors = divided(lower, beta, compute), row_factors(beta, compute)
    return {INPUT: source.reshape(-1, size, size), BETA: factors.reshape(-1, size, 1)}


def assemble(program: Program, result: torch.Tensor, beta: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``T`` from the program's output: ``I + S``, ``I + beta W``, or the output itself."""
    if not program.implicit_identity:
        return result
    if program.vectors:
        assert beta is not None
        compute = torch.float64 if result.dtype == torch.float64 else torch.float32
        result = (result.to(compute) * row_factors(beta, compute)).to(result.dtype)
    return result + torch.eye(program.chunk, dtype=result.dtype, device=result.device)
