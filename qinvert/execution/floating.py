"""Runs a program in floating point, rounding to a storage type after every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch

from qinvert.errors import InputError
from qinvert.execution.inputs import assemble, fold, needed, only, program_inputs, unfold
from qinvert.execution.tensors import TorchEvaluator, along
from qinvert.matrices import like
from qinvert.program.step_list import StepList
from qinvert.program.steps import Add, Exponential, MatMul, Multiply, Rescale, Scale, Subtract
from qinvert.systems import Systems

#: Receives a tensor's name and its value.
Observer: TypeAlias = Callable[[str, torch.Tensor], None]
#: Storage types; products of the 16-bit ones accumulate in float32.
STORAGE_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class FloatEvaluator(TorchEvaluator):
    """Every step computes in float32 (float64 if stored in float64); then its result is stored.

    `stored` rounds to ``dtype``; subclasses may round in another way.
    """

    def __init__(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(batch, dtype, device)
        self.compute = torch.float64 if dtype == torch.float64 else torch.float32

    def stored(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return the values that later steps read of the tensor ``name``."""
        return values.to(self.dtype)

    def matmul(
        self,
        step: MatMul,
        left: torch.Tensor,
        right: torch.Tensor,
        add: list[torch.Tensor],
        subtract: list[torch.Tensor],
    ) -> torch.Tensor:
        total = left.to(self.compute) @ right.to(self.compute)
        for term in add:
            total += term
        for term in subtract:
            total -= term
        return self.stored(step.output, total)

    def add(self, step: Add, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.stored(step.output, left.to(self.compute) + right.to(self.compute))

    def subtract(self, step: Subtract, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.stored(step.output, left.to(self.compute) - right.to(self.compute))

    def multiply(self, step: Multiply, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.stored(step.output, left.to(self.compute) * right.to(self.compute))

    def exponential(self, step: Exponential, source: torch.Tensor) -> torch.Tensor:
        return self.stored(step.output, torch.exp(source.to(self.compute)))

    def rescale(self, step: Rescale, source: torch.Tensor) -> torch.Tensor:
        return self.stored(step.output, step.factor * source.to(self.compute))

    def scale(self, step: Scale, source: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return self.stored(step.output, source.to(self.compute) * along(step, vector).to(self.compute))


def execute(
    program: StepList,
    inputs: Mapping[str, object],
    dtype: torch.dtype | None = None,
    observe: Observer | None = None,
) -> dict[str, torch.Tensor]:
    """Every output of a program in floating point, for any ports.

    Parameters
    ----------
    program : StepList
    inputs : mapping
        A tensor or array ``(..., rows, columns)`` for every input port, all
        with the same axes in front.
    dtype, observe
        See `run`.

    Returns
    -------
    dict
        ``(..., rows, columns)`` in ``dtype`` for every output port.

    Raises
    ------
    InputError
        If an input or ``dtype`` is not legal.
    """
    dtype = _storage_type(dtype)
    values, front = fold(program, inputs, dtype)
    return unfold(evaluate(program, values, dtype, observe), front, inputs)


def run(
    program: StepList,
    L: torch.Tensor,  # noqa: N803 - the field's name of this matrix
    dtype: torch.dtype | None = None,
    observe: Observer | None = None,
    beta: torch.Tensor | None = None,
) -> torch.Tensor:
    """``T = (I + L)^-1`` by the program's steps in floating point.

    Parameters
    ----------
    program : StepList
        Program of an inverse; `execute` takes any other.
    L : tensor or array, shape ``(..., C, C)``
        Strictly lower triangular.
    dtype : torch.dtype, optional
        Storage type after every step: float64, float32 (default), float16 or
        bfloat16; the last two accumulate in float32.
    observe : callable, optional
        ``observe(name, tensor)`` receives the inputs and every step's output,
        ``[blocks * batch, rows, columns]``.
    beta : tensor or array, shape ``(..., C)``, optional
        In [0, 2]; a factored program needs it, others ignore it.

    Returns
    -------
    tensor or array
        ``T`` in ``dtype`` (as an array: float32 for bfloat16).  It may
        hold Inf or NaN where the method overflows, as float studies show.

    Raises
    ------
    InputError
        If ``L``, ``beta`` or ``dtype`` is not legal.
    ProgramError
        If the program does not compute an inverse.
    """
    dtype, factored = _storage_type(dtype), program.inverse_ports.factored
    systems = Systems.checked(L, beta if factored else None, chunk=program.chunk)
    result = run_systems(program, needed(program, systems), dtype, observe)
    if not isinstance(L, torch.Tensor) and dtype == torch.bfloat16:
        result = result.to(torch.float32)
    return like(result, L, beta)  # type: ignore[return-value] # arrays in, arrays out


def run_systems(
    program: StepList, systems: Systems, dtype: torch.dtype, observe: Observer | None = None
) -> torch.Tensor:
    """`run` of checked systems, with beta where the program takes it."""
    inputs = {name: x.to(dtype) for name, x in program_inputs(program, systems, dtype).items()}
    result = only(evaluate(program, inputs, dtype, observe))
    return assemble(program, result.reshape(systems.lower.shape), systems)


def evaluate(
    program: StepList,
    inputs: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    observe: Observer | None = None,
) -> dict[str, torch.Tensor]:
    """Every output ``[batch, rows, columns]`` from inputs of the same form, stored in ``dtype``."""
    first = next(iter(inputs.values()))
    # The caller chooses the storage type, so autocast must not change it.
    with torch.autocast(first.device.type, enabled=False):
        return program.evaluate(FloatEvaluator(first.shape[0], dtype, first.device), inputs, observe)


def _storage_type(dtype: torch.dtype | None) -> torch.dtype:
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in STORAGE_TYPES:
        raise InputError(f"dtype {dtype} is not a storage type; use float64, float32, float16 or bfloat16")
    return dtype
