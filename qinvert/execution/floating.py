"""Runs a program in floating point, rounding to a storage type after every step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qinvert.errors import InputError
from qinvert.execution.inputs import assemble, needed_beta, program_inputs
from qinvert.execution.tensors import TorchEvaluator, along
from qinvert.matrices import check_matrices, like
from qinvert.program.program import Program
from qinvert.program.steps import INPUT, Add, MatMul, Rescale, Scale

#: Storage types; products of the 16-bit ones accumulate in float32.
STORAGE_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class FloatEvaluator(TorchEvaluator):
    """Every step computes in float32 (float64 for float64), then is stored.

    `stored` rounds to ``dtype``; subclasses round to what they study.
    """

    def __init__(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(batch, dtype, device)
        self.compute = torch.float64 if dtype == torch.float64 else torch.float32

    def stored(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return what later steps read of the tensor ``name``."""
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

    def rescale(self, step: Rescale, source: torch.Tensor) -> torch.Tensor:
        return self.stored(step.output, step.factor * source.to(self.compute))

    def scale(self, step: Scale, source: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return self.stored(step.output, source.to(self.compute) * along(step, vector).to(self.compute))


def run(
    program: Program,
    L: torch.Tensor,  # noqa: N803 - the field's name of this matrix
    dtype: torch.dtype | None = None,
    observe: Callable[[str, torch.Tensor], None] | None = None,
    beta: torch.Tensor | None = None,
) -> torch.Tensor:
    """``T = (I + L)^-1`` by the program's steps in floating point.

    Parameters
    ----------
    program : Program
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
        ``T`` in ``dtype`` (as an array: float32 for bfloat16).  May hold Inf
        or NaN where the method overflows: that is what a float study shows.

    Raises
    ------
    InputError
        If ``L``, ``beta`` or ``dtype`` is not legal.
    """
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in STORAGE_TYPES:
        raise InputError(f"dtype {dtype} is no storage type; use float64, float32, float16 or bfloat16")
    lower = check_matrices(L, program.chunk)
    result = run_checked(program, lower, dtype, observe, needed_beta(program, lower, beta))
    if not isinstance(L, torch.Tensor) and dtype == torch.bfloat16:
        result = result.to(torch.float32)
    return like(result, L)  # type: ignore[return-value] # arrays in, arrays out


def run_checked(
    program: Program,
    lower: torch.Tensor,
    dtype: torch.dtype,
    observe: Callable[[str, torch.Tensor], None] | None = None,
    beta: torch.Tensor | None = None,
) -> torch.Tensor:
    """`run` of checked tensors."""
    # The storage type is this function's to choose, not autocast's.
    with torch.autocast(lower.device.type, enabled=False):
        inputs = {
            name: value.to(dtype) for name, value in program_inputs(program, lower, beta, dtype).items()
        }
        source = inputs.pop(INPUT)
        evaluator = FloatEvaluator(source.shape[0], dtype, source.device)
        result = program.evaluate(evaluator, source, observe, inputs).reshape(lower.shape)
    return assemble(program, result, beta)
