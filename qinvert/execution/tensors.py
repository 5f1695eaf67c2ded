"""Steps that only move values, on torch tensors; float and integer execution share them."""

from __future__ import annotations

from functools import lru_cache

import torch

from qinvert.program.evaluator import Evaluator
from qinvert.program.sparsity import constant_support
from qinvert.program.steps import Axis, Concat, Constant, Mask, Range, Scale, Slice, Transpose


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
        # This is where and not a product, because inf * 0 would be NaN.
        # All blocks share one mask, so the mask of the first is enough.
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return torch.where(constant[:1] != 0, source, zero)

    def transpose(self, step: Transpose, source: torch.Tensor) -> torch.Tensor:
        return source.mT

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
    """Return the 0/1 matrix of ``constant``, float32 ``[rows, columns]``; callers must not write to it."""
    return torch.from_numpy(constant_support(constant)).to(torch.float32)
