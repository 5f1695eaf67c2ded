"""`solve_tril`: the inverse of every chunk, by a fused kernel where there is one."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Final, TypeAlias

import torch

from qinvert.checks import check_member
from qinvert.errors import InputError
from qinvert.execution.simulator import simulate_batched
from qinvert.kernels import launch
from qinvert.kernels.fla_layout import check_sequences, chunk_rows, chunk_table, gather, scatter
from qinvert.kernels.float_ops import Precision
from qinvert.kernels.generator import Generated, float_kernel, integer_kernel
from qinvert.kernels.tiles import UnsupportedError
from qinvert.matrices import FLOATS, without_gradient
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.systems import Systems

#: Legal sizes of A's matrices in floating point.
CHUNKS: Final = (16, 32, 64, 128)
#: Input types that lose nothing as operands: float16 holds bfloat16's 8 bits, except below 2**-24.
EXACT: Final = {
    Precision.FP16: (torch.float16, torch.bfloat16),
    Precision.BF16: (torch.bfloat16,),
    Precision.TF32: (torch.float16, torch.bfloat16),
    Precision.IEEE: (torch.float16, torch.bfloat16, torch.float32),
}
#: Largest number of kernels that are kept: those of the plans used last.
MAX_KERNELS: Final = 256

#: A plan, and its kernel or the reason why it has none.
_Kernel: TypeAlias = tuple[QuantizedProgram, Generated | UnsupportedError]

_log = logging.getLogger("qinvert")
_told: set[str] = set()
_kernels: OrderedDict[tuple[int, bool, bool], tuple[QuantizedProgram, Generated | UnsupportedError]] = (
    OrderedDict()
)


def solve_tril(
    A: torch.Tensor,  # noqa: N803 - the name in flash-linear-attention
    cu_seqlens: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    output_dtype: torch.dtype | None = torch.float32,
    *,
    plan: QuantizedProgram | None = None,
    precision: str = Precision.FP16,
) -> torch.Tensor:
    """``T = (I + tril(A, -1))^-1`` of every chunk.

    It takes and returns the same as flash-linear-attention's function of this
    name.  On a CUDA device one fused kernel reads each matrix once and writes it
    once.  Where there is no kernel (without Triton, or for a plan that kernels
    cannot express) and on other devices, the batched torch path runs; on CUDA, one
    line in the log ``qinvert`` then says why.

    Parameters
    ----------
    A : torch.Tensor, shape ``[B, T, H, C]``
        Row t of a sequence is row ``t mod C`` of its chunk's matrix; what
        is on or above the diagonal is not read.  C is 16, 32, 64 or 128,
        or the plan's.  Finite values of any float type.
    cu_seqlens : torch.Tensor, shape ``[N + 1]``, optional
        Ends of N sequences that follow each other in a batch of 1; every
        sequence starts a new chunk.
    chunk_indices : torch.Tensor, shape ``[chunks, 2]``, optional
        Sequence and number of every chunk; derived from ``cu_seqlens`` if missing.
    output_dtype : torch.dtype, optional
        dtype of the result; None means A's.
    plan : QuantizedProgram, optional
        Run this plan's integers, bit for bit as `LayerPlan.inverse`, instead
        of a block merge in floating point.
    precision : Precision
        Precision of the float products.  With ``fp16`` the relative error of random
        keys is about 1e-4, with ``fp16x3`` 1e-7.

    Returns
    -------
    torch.Tensor, shape ``[B, T, H, C]``
        Every element is written, including zeros above the diagonal.

    Raises
    ------
    InputError
        If A, ``cu_seqlens`` or ``precision`` is not legal.
    """
    precision = _check(A, cu_seqlens, plan, precision)
    given, A = A, A.detach().contiguous()  # noqa: N806
    if cu_seqlens is None:
        chunk_indices = None
    elif chunk_indices is None:
        chunk_indices = chunk_table(cu_seqlens, A.shape[-1])
    else:
        cu_seqlens, chunk_indices = cu_seqlens.contiguous(), chunk_indices.contiguous()
    result = torch.empty_like(A, dtype=A.dtype if output_dtype is None else output_dtype)
    if not result.numel():
        return result
    generated = _kernel(A, plan, precision)
    if generated is None or not _launched(generated, A, result, cu_seqlens, chunk_indices):
        _solve_batched(A, cu_seqlens, chunk_indices, plan, result)
    return without_gradient(result, given)


def fused_inverse(
    plan: QuantizedProgram, lower: torch.Tensor, count: bool = False
) -> tuple[torch.Tensor, dict[str, int]] | None:
    """`LayerPlan.inverse` of checked matrices by the plan's kernel; None, and one log line, if it has none.

    With ``count`` the result also has the number of values on the ends of its grid
    for every tensor that has any and is not partial.
    """
    generated = _kernel(lower, plan, Precision.FP16, count)
    if generated is None:
        return None
    rows = lower.reshape(1, -1, 1, plan.chunk).contiguous()
    result = torch.empty_like(rows, dtype=torch.float32)
    counters = torch.zeros(len(generated.counted), dtype=torch.int64, device=rows.device) if count else None
    if not _launched(generated, rows, result, counters=counters):
        return None
    numbers = [] if counters is None else counters.tolist()
    counts = {name: n for name, n in zip(generated.counted, numbers, strict=True) if n}
    return result.reshape(lower.shape), counts


def _check(
    A: torch.Tensor,  # noqa: N803
    cu_seqlens: torch.Tensor | None,
    plan: QuantizedProgram | None,
    precision: str,
) -> Precision:
    if not isinstance(A, torch.Tensor) or A.ndim != 4 or A.dtype not in FLOATS:
        given = f"{A.dtype} {list(A.shape)}" if isinstance(A, torch.Tensor) else type(A).__name__
        raise InputError(f"A is {given}; pass a float tensor [batch, time, heads, C]")
    sizes = CHUNKS if plan is None else (plan.chunk,)
    if A.shape[-1] not in sizes:
        raise InputError(
            f"A has matrices of size {A.shape[-1]}; the legal sizes are {', '.join(map(str, sizes))}"
        )
    if plan is not None and plan.program.inverse_ports.factored:
        raise InputError(f"{plan.program.title} takes beta; call plan.inverse(L, beta)")
    if cu_seqlens is not None:
        check_sequences(A, cu_seqlens)
    return check_member(Precision, "precision", precision, InputError)


def _kernel(
    A: torch.Tensor,  # noqa: N803
    plan: QuantizedProgram | None,
    precision: Precision,
    count: bool = False,
) -> Generated | None:
    if not A.is_cuda and not launch.interpreted():
        return None
    reason = launch.missing()
    if reason is None:
        if plan is None:
            return float_kernel(A.shape[-1], precision, A.dtype in EXACT.get(precision, ()))
        found = _planned(plan, count)
        if isinstance(found, Generated):
            return found
        reason = str(found)
    _tell(reason)
    return None


def _tell(reason: str) -> None:
    if reason not in _told:
        _told.add(reason)
        _log.warning("no fused kernel: %s; the batched torch path runs instead", reason)


def _launched(generated: Generated, *tensors: torch.Tensor | None, **counters: torch.Tensor | None) -> bool:
    try:
        launch.launch(generated, *tensors, **counters)  # type: ignore[arg-type]
    except UnsupportedError as error:
        _tell(str(error))
        return False
    return True


def _planned(plan: QuantizedProgram, count: bool) -> Generated | UnsupportedError:
    # Plans cannot be hashed.  The entry keeps its plan alive, and so the plan's id stays unique.
    interpreted = launch.interpreted()
    key = (id(plan), count, interpreted)
    if key not in _kernels:
        try:
            _kernels[key] = plan, integer_kernel(plan, count, interpreted)
        except UnsupportedError as error:
            _kernels[key] = plan, error
        if len(_kernels) > MAX_KERNELS:
            _kernels.popitem(last=False)
    return _kernels[key][1]


def _solve_batched(
    A: torch.Tensor,  # noqa: N803
    cu_seqlens: torch.Tensor | None,
    chunk_indices: torch.Tensor | None,
    plan: QuantizedProgram | None,
    result: torch.Tensor,
) -> None:
    rows = chunk_rows(A, cu_seqlens, chunk_indices)
    lower = gather(A, rows)
    if plan is not None:
        inverse = simulate_batched(plan, Systems(lower=lower))
    else:
        eye = torch.eye(lower.shape[-1], dtype=torch.float32, device=A.device)
        inverse = torch.linalg.solve_triangular(
            lower.to(torch.float32), eye.expand(lower.shape), upper=False, unitriangular=True
        )
    scatter(inverse, rows, result)
