"""The part of the Triton source that all kernels share: addresses, loads, stores, division."""

from typing import Final

#: Head of every kernel, up to the statements of its program.  A correctly rounded reciprocal and
#: two residual steps give the correctly rounded quotient (P. Markstein, IBM J. Res. Dev. 34, 1990)
#: without the branches of a division instruction; `qinvert.kernels.division` finds where fewer are enough.
#: `divide_slowly` is for interpreters, which round a fused multiply-add twice.
TEMPLATE: Final = """\
import triton
import triton.language as tl


@triton.jit
def divide_0(x, scale, reciprocal):
    return x * reciprocal


@triton.jit
def divide_1(x, scale, reciprocal):
    quotient = x * reciprocal
    return tl.fma(tl.fma(-quotient, scale, x), reciprocal, quotient)


@triton.jit
def divide_2(x, scale, reciprocal):
    quotient = divide_1(x, scale, reciprocal)
    return tl.fma(tl.fma(-quotient, scale, x), reciprocal, quotient)


@triton.jit
def divide_slowly(x, scale, reciprocal):
    return tl.div_rn(x, scale)


@triton.jit
def load_tile(pointers, mask, FULL: tl.constexpr):
    if FULL:
        value = tl.load(pointers)
    else:
        value = tl.load(pointers, mask=mask, other=0.0)
    return value.to(tl.float32)


@triton.jit
def store_tile(pointers, value, mask, FULL: tl.constexpr):
    value = value.to(pointers.dtype.element_ty)
    if FULL:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=mask)


@triton.jit
def count_values(counter, found):
    total = tl.sum(found).to(tl.int64)
    if total > 0:
        tl.atomic_add(counter, total)


@triton.jit
def kernel(
    L, T, cu_seqlens, chunk_indices, counters, total, length, per_sequence, <arguments>
    CHUNK: tl.constexpr, HEADS: tl.constexpr, NB: tl.constexpr,
    FULL: tl.constexpr, PACKED: tl.constexpr, VARIABLE: tl.constexpr,
):
    STRIDE: tl.constexpr = HEADS * CHUNK
    row = tl.arange(0, 16)[None, :, None]
    column = tl.arange(0, 16)[None, None, :]
    n = tl.program_id(0) * NB + tl.arange(0, NB)[:, None, None]
    live = n < total
    head = n % HEADS
    chunk = n // HEADS
    if VARIABLE:
        sequence = tl.load(chunk_indices + chunk * 2, mask=live, other=0).to(tl.int64)
        index = tl.load(chunk_indices + chunk * 2 + 1, mask=live, other=0).to(tl.int64)
        begin = tl.load(cu_seqlens + sequence, mask=live, other=0).to(tl.int64)
        rows = tl.load(cu_seqlens + sequence + 1, mask=live, other=0).to(tl.int64) - begin - index * CHUNK
    elif PACKED:
        index = chunk.to(tl.int64)
        begin = index * 0
        rows = CHUNK
    else:
        index = (chunk % per_sequence).to(tl.int64)
        begin = (chunk // per_sequence).to(tl.int64) * length
        rows = length - index * CHUNK
    base = ((begin + index * CHUNK) * HEADS + head) * CHUNK
"""
