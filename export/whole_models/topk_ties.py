"""Equal values in `torch.topk`: which of them PyTorch takes is open, ONNX says it."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class LowestIndexFirst(TorchFunctionMode):
    """`torch.topk` that takes the lower index of equal values, as ONNX says, inside a ``with`` block.

    PyTorch leaves open which one it takes.  Sparse attention meets exact ties:
    its scores are 0 wherever ReLU cuts all heads.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace one function."""
        run = _stable_topk if func in (torch.topk, torch.Tensor.topk) else func
        return run(*args, **(kwargs or {}))


def _stable_topk(
    input: torch.Tensor,  # noqa: A002 - the name in torch
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,  # noqa: A002, ARG001 - the name in torch
) -> Any:
    values, indices = torch.sort(input, dim=dim, descending=largest, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))
