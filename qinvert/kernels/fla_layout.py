"""Chunks of flash-linear-attention's layout ``[B, T, H, C]``: row t of a chunk holds row t of its matrix."""

from __future__ import annotations

import torch

from qinvert.errors import InputError


def chunk_table(cu_seqlens: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return (sequence, number of the chunk in it) of every chunk, ``[chunks, 2]``."""
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    counts = (lengths + chunk - 1) // chunk
    sequences = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    first = torch.cumsum(counts, 0) - counts
    numbers = torch.arange(len(sequences), device=counts.device) - first[sequences]
    return torch.stack([sequences, numbers], 1).to(cu_seqlens.dtype)


def check_sequences(A: torch.Tensor, cu_seqlens: torch.Tensor) -> None:  # noqa: N803
    """Refuse ends of sequences that do not fit a tensor ``[1, T, H, C]``.

    Raises
    ------
    InputError
        With what was given.
    """
    integral = not cu_seqlens.is_floating_point() and not cu_seqlens.is_complex()
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or not integral:
        raise InputError(
            f"cu_seqlens has shape {list(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; pass the ends of "
            "the sequences as a vector of integers that starts with 0"
        )
    if A.shape[0] != 1:
        raise InputError(
            f"A has {A.shape[0]} batches; with cu_seqlens all sequences follow each other in batch 1"
        )


def chunk_rows(
    A: torch.Tensor,  # noqa: N803
    cu_seqlens: torch.Tensor | None,
    chunk_indices: torch.Tensor | None,
) -> torch.Tensor:
    """Return the row of ``A.reshape(B * T, H, C)`` of every row of every chunk, -1 where there is none.

    Shape ``[chunks, C]``.
    """
    batch, length, _, chunk = A.shape
    if cu_seqlens is None or chunk_indices is None:
        starts = torch.arange(0, length, chunk, device=A.device)
        begins = torch.arange(batch, device=A.device)[:, None] * length
        starts, ends = (begins + starts).flatten(), (begins + length).expand(-1, len(starts)).flatten()
    else:
        sequences, numbers = chunk_indices.long().unbind(1)
        starts, ends = cu_seqlens[sequences] + numbers * chunk, cu_seqlens[sequences + 1]
    rows = starts[:, None] + torch.arange(chunk, device=A.device)
    return torch.where(rows < ends[:, None], rows, -1)


def gather(A: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """Return the matrices ``[chunks, H, C, C]``, strictly lower triangular, zero where rows are missing."""
    flat = A.reshape(-1, *A.shape[2:])
    matrices = torch.where(rows[..., None, None] >= 0, flat[rows.clamp(min=0)], 0)
    return matrices.transpose(1, 2).tril(-1)


def scatter(matrices: torch.Tensor, rows: torch.Tensor, result: torch.Tensor) -> None:
    """Write matrices to the places of ``result [B, T, H, C]`` from which `gather` reads."""
    values = matrices.transpose(1, 2)[rows >= 0]
    result.view(-1, *result.shape[2:])[rows[rows >= 0]] = values.to(result.dtype)
