"""Turns what a caller has into the inputs of a program, and the outputs back."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qinvert.errors import InputError
from qinvert.matrices import as_tensor, divided, row_factors, without_gradient
from qinvert.program.ports import Port
from qinvert.program.step_list import StepList
from qinvert.systems import Systems


def needed(program: StepList, systems: Systems, name: str = "beta") -> Systems:
    """Return the systems with beta if ``program`` takes it, else without.

    Raises
    ------
    InputError
        If beta is needed and missing.
    ProgramError
        If the program does not compute an inverse.
    """
    if not program.inverse_ports.factored:
        return Systems(lower=systems.lower)
    if systems.beta is None:
        raise InputError(
            f"{program.title} divides the rows of L by {name}, which is missing; pass it with L, "
            f"shape {list(systems.lower.shape[:-1])}"
        )
    return systems


def program_inputs(program: StepList, systems: Systems, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the real value of every input of an inverse, with the batch in one axis.

    The value is ``M = -L``.  Where the program is factored, the values are
    ``K = -L / max(beta, MIN_BETA)`` and that divisor, in float32 (float64 for
    ``dtype`` float64).
    """
    ports, flat = program.inverse_ports, systems.flat()
    if ports.beta is None:
        return {ports.matrix: -flat.lower.to(dtype)}
    assert flat.beta is not None
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        ports.matrix: divided(flat.lower, flat.beta, compute),
        ports.beta: row_factors(flat.beta, compute),
    }


def assemble(program: StepList, result: torch.Tensor, systems: Systems) -> torch.Tensor:
    """Return ``T`` from the result of an inverse: ``I + S``, ``I + beta W``, or the result itself."""
    ports = program.inverse_ports
    if ports.holds_identity:
        return result
    if ports.factored:
        assert systems.beta is not None
        compute = torch.float64 if result.dtype == torch.float64 else torch.float32
        result = (result.to(compute) * row_factors(systems.beta, compute)).to(result.dtype)
    return result + torch.eye(program.chunk, dtype=result.dtype, device=result.device)


def only(outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the value of the single output of an inverse."""
    (value,) = outputs.values()
    return value


def fold(
    program: StepList, inputs: Mapping[str, object], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], torch.Size]:
    """Return the value of every port ``[batch, rows, columns]``, and the axes that became the batch.

    Parameters
    ----------
    program : StepList
    inputs : mapping
        A tensor or array ``(..., rows, columns)`` for every input, all with
        the same axes in front.
    dtype : torch.dtype
        dtype of the result.

    Raises
    ------
    InputError
        If an input is missing, unknown or not finite, or has another shape; or if
        one that must be strictly lower triangular is not.
    """
    names = [port.name for port in program.inputs]
    if set(inputs) != set(names):
        raise InputError(
            f"{program.title} takes the inputs {', '.join(names)}, got {', '.join(inputs) or 'none'}; "
            "pass one value for each"
        )
    tensors = {port.name: _checked(port, inputs[port.name]) for port in program.inputs}
    fronts = {name: tensor.shape[:-2] for name, tensor in tensors.items()}
    if len(set(fronts.values())) != 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise InputError(f"{shapes}: all axes but the last two must be the same for every input")
    values = {name: x.reshape(-1, *x.shape[-2:]).to(dtype) for name, x in tensors.items()}
    return values, fronts[names[0]]


def unfold(
    outputs: Mapping[str, torch.Tensor], front: torch.Size, inputs: Mapping[str, object]
) -> dict[str, torch.Tensor]:
    """Return outputs with the axes that `fold` has taken from the front of ``inputs``.

    They refuse to pass back a gradient, see `qinvert.matrices.WithoutGradient`.
    """
    return {
        name: without_gradient(value.reshape(*front, *value.shape[-2:]), *inputs.values())
        for name, value in outputs.items()
    }


def _checked(port: Port, value: object) -> torch.Tensor:
    tensor = as_tensor(value, port.name)
    if tensor.ndim < 2 or tuple(tensor.shape[-2:]) != port.shape[1:] or tensor.numel() == 0:
        raise InputError(
            f"{port.name} has shape {list(tensor.shape)}; pass (..., {port.shape.rows}, {port.shape.columns})"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{port.name} holds NaN or Inf values; look for them upstream")
    if port.meaning.strictly_lower and bool(torch.triu(tensor).any()):
        raise InputError(f"{port.name} is not strictly lower triangular; pass for example tril(A, -1)")
    return tensor
