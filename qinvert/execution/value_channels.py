"""Factors and rotations of value channels, on torch tensors."""

from __future__ import annotations

from functools import lru_cache

import torch

from qinvert.chunk_step.channel_map import rotation
from qinvert.errors import InputError
from qinvert.plan.value_channels import ValueChannels


def enter(channels: ValueChannels | None, values: torch.Tensor, axis: int = 1) -> torch.Tensor:
    """``(v 2^-e) R``: values or states as the integers of a plan hold them.

    Parameters
    ----------
    channels : ValueChannels or None
    values : torch.Tensor
        Heads along ``axis``, channels along the last axis.
    axis : int
    """
    if channels is None:
        return values
    scaled = values * _factors(channels, values, axis, -1)
    return _rotated(scaled) if channels.rotated else scaled


def leave(channels: ValueChannels | None, values: torch.Tensor, axis: int = 1) -> torch.Tensor:
    """``(o R^T) 2^e``: the inverse of `enter`."""
    if channels is None:
        return values
    turned = _rotated(values) if channels.rotated else values
    return turned * _factors(channels, values, axis, 1)


def _factors(channels: ValueChannels, values: torch.Tensor, axis: int, sign: int) -> torch.Tensor:
    exponents = torch.tensor(channels.exponents, dtype=torch.float64, device=values.device)
    if channels.heads not in (1, values.shape[axis]) or channels.value_size != values.shape[-1]:
        raise InputError(
            f"values have {values.shape[axis]} heads and {values.shape[-1]} channels, but the plan has "
            f"{channels.heads} and {channels.value_size}; pass the layer that it was calibrated on"
        )
    shape = [1] * values.ndim
    shape[axis], shape[-1] = channels.heads, channels.value_size
    # Powers of two are exact in every type.
    return torch.exp2(sign * exponents).to(values.dtype).reshape(shape)


@lru_cache(maxsize=8)
def hadamard(size: int) -> torch.Tensor:
    """Hadamard's matrix over the square root of its size, float64: symmetric, its own inverse."""
    return torch.from_numpy(rotation(size))


def _rotated(values: torch.Tensor) -> torch.Tensor:
    # Rounded to the type of the values once.
    return (values.to(torch.float64) @ hadamard(values.shape[-1]).to(values.device)).to(values.dtype)
