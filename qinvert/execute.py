"""Runs a program in floating point, rounding to a storage type after every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from qinvert.errors import InputError
from qinvert.matrices import check_beta, check_matrices, divided, like, row_factors
from qinvert.program import Evaluator, Program
from qinvert.steps import BETA, INPUT, Add, Axis, Concat, Constant, Mask, MatMul, Range, Rescale, Scale, Slice

#: Storage types; products of the 16-bit ones accumulate in float32.
STORAGE_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TorchEvaluator(Evaluator[torch.Tensor]):
    """Steps that only move values, shared by float and integer execution.

    Tensors are ``[blocks * batch, rows, columns]``.
    """

    def __init__(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.batch = batch
        self.dtype = dtype
        self.device = device

    def constant(self, constant: Constant, blocks: int) -> torch.Tensor:
        matrix = constant_matrix(constant).to(self.device, self.dtype)
        return matrix.expand(blocks * self.batch, -1, -1)

    def mask(self, step: Mask, source: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
        # where, not a product: inf * 0 would be NaN.
        # All blocks share one mask, so that of the first is enough.
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return torch.where(constant[:1] != 0, source, zero)

    def slice(self, step: Slice, source: torch.Tensor) -> torch.Tensor:
        blocks = None if step.blocks is None else (step.blocks[0] * self.batch, step.blocks[1] * self.batch)
        return source[_span(blocks), _span(step.rows), _span(step.columns)]

    def concat(self, step: Concat, sources: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(sources, dim=list(Axis).index(step.axis))


def along(step: Scale, vector: torch.Tensor) -> torch.Tensor:
    """Return a vector ``[B, C, 1]`` so that it multiplies the rows or the columns of a tensor."""
    return vector if step.axis == Axis.ROWS else vector.mT


def _span(span: Range | None) -> slice:
    return slice(None) if span is None else slice(*span)


@lru_cache(maxsize=256)
def constant_matrix(constant: Constant) -> torch.Tensor:
    """Return the 0/1 matrix of ``constant``, float32 ``[rows, columns]``; not to be written to."""
    columns = torch.arange(constant.columns)
    starts, stops = torch.tensor(constant.ones).T.unsqueeze(-1)
    ones: torch.Tensor = (columns >= starts) & (columns < stops)
    return ones.to(torch.float32)


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
