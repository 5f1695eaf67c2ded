"""Compiles generated kernels and starts them; the only module that imports Triton."""

from __future__ import annotations

import linecache
import os
from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from qinvert.errors import reason
from qinvert.kernels.generator import Generated
from qinvert.kernels.tiles import UnsupportedError


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on CPU tensors, because TRITON_INTERPRET=1 is set."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    """Return the reason why no kernel can run here, or None if kernels can run."""
    if torch.version.hip is not None:
        return "kernels run on CUDA devices only"
    return None if find_spec("triton") else "triton is not installed; run: pip install 'qinvert[gpu]'"


@lru_cache(maxsize=256)
def compiled(text: str) -> Any:
    """Return the Triton function of a generated source; it is compiled when it is first launched."""
    # Triton reads the source of a function through linecache.
    name = f"<qinvert kernel {hash(text) & 0xFFFFFFFFFFFF:012x}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": "qinvert.kernels.generated"}
    exec(compile(text, name, "exec"), namespace)
    return namespace["kernel"]


@lru_cache(maxsize=256)
def scalars(values: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor]:
    """Return the scalars of a kernel as its argument on a device."""
    return (torch.tensor(values, dtype=torch.float32, device=device),)


def launch(
    generated: Generated,
    A: torch.Tensor,  # noqa: N803 - the name in flash-linear-attention
    result: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> Any:
    """Start the kernel on A and ``result``, both contiguous ``[B, T, H, C]``; return its handle.

    ``chunk_indices[i]`` has the sequence of chunk i and the chunk's number in that
    sequence of ``cu_seqlens``.  Both are given, or neither.

    Raises
    ------
    UnsupportedError
        If Triton cannot compile or start it, for example without a C compiler.
    """
    batch, length, heads, chunk = A.shape
    per_sequence = -(-length // chunk)
    variable = cu_seqlens is not None and chunk_indices is not None
    chunks = len(chunk_indices) if chunk_indices is not None else batch * per_sequence
    total, even = chunks * heads, not variable and length % chunk == 0
    group = generated.group
    limits = {} if generated.registers is None else {"maxnreg": generated.registers}
    try:
        with torch.cuda.device(A.device) if A.is_cuda else nullcontext():
            return compiled(generated.text)[(-(-total // group),)](
                A,
                result,
                cu_seqlens if variable else A,
                chunk_indices if variable else A,
                A if counters is None else counters,
                total,
                length,
                per_sequence,
                *(scalars(generated.scalars, A.device) if generated.loaded else generated.scalars),
                CHUNK=chunk,
                HEADS=heads,
                NB=group,
                FULL=even and total % group == 0,
                PACKED=even and heads == 1,
                VARIABLE=variable,
                num_warps=group,
                num_stages=1,
                enable_fp_fusion=generated.fused,
                **limits,
            )
    except Exception as error:
        # Triton's compilers and tools raise errors of many types.
        raise UnsupportedError(f"Triton fails ({reason(error)})") from error
