"""Tells models apart by their weights, in a pass over them that costs less than one batch."""

from __future__ import annotations

import hashlib
from itertools import chain
from typing import Final

import numpy as np
import torch

#: Elements of each tensor that are hashed, evenly spread; all others enter by their sum.
ELEMENTS: Final = 1024
#: Integers as wide as an element, by its bytes.
INTEGERS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Types that float32 holds exactly: weights that are loaded in another of them are the same.
FLOATS: Final = (torch.bfloat16, torch.float16, torch.float32)


def model_digest(model: torch.nn.Module) -> str:
    """Name and hash of a model: names, types, shapes and bits of all weights.

    Bits are added as integers, which has one result on every device and in
    every order, and some of them are hashed in their places.  Weights that
    accelerate has put into memory or on the disk are read from there; those
    that are nowhere (meta tensors) enter without their values.
    """
    digest = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        kept = _offloaded(model, name) if tensor.is_meta else None
        held = tensor if kept is None else kept
        digest.update(f"{name} {held.dtype} {tuple(held.shape)}".encode())
        digest.update(_content(held.detach()))
    return f"{type(model).__name__} {digest.hexdigest()[:16]}"


def weights_digest(model: torch.nn.Module) -> str | None:
    """Hash of the weights as `model_digest` takes it, but of their values rounded to bfloat16.

    So it is one for a model in float32 and for its cast to bfloat16, and for
    weights of 16 bits, whatever type holds them.  Weights that accelerate has
    put into memory or on the disk are read from there.  None where weights are
    elsewhere (meta tensors), so that nobody knows their values.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        tensor = _offloaded(model, name) if parameter.is_meta else parameter
        if tensor is None or tensor.is_meta:
            return None
        kind = "float" if tensor.dtype in FLOATS else str(tensor.dtype)
        digest.update(f"{name} {kind} {tuple(tensor.shape)}".encode())
        values = tensor.detach().to(torch.bfloat16) if tensor.dtype in FLOATS else tensor.detach()
        digest.update(_content(values))
    return digest.hexdigest()


def _offloaded(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    """Return the values that accelerate keeps of a parameter; None where it keeps none."""
    module, _, own = name.rpartition(".")
    hook = getattr(model.get_submodule(module), "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        kept = getattr(part, "weights_map", None)
        if kept is not None:
            try:
                return torch.as_tensor(kept[own])
            except KeyError:
                continue
    return None


def _content(tensor: torch.Tensor) -> bytes:
    integer = INTEGERS.get(tensor.element_size())
    if tensor.is_meta or tensor.layout != torch.strided or integer is None or not tensor.numel():
        return b""
    # A bfloat16 is the upper half of a float32: shifted, its bits are those of the float32.
    shift = 16 if tensor.dtype == torch.bfloat16 else 0
    if tensor.dtype == torch.float16:
        tensor, integer = tensor.to(torch.float32), torch.int32
    bits = tensor.contiguous().view(integer).reshape(-1)
    places = torch.linspace(0, len(bits) - 1, min(ELEMENTS, len(bits)), dtype=torch.float64).long()
    chosen = bits[places.to(bits.device)].cpu().contiguous()
    if shift:
        chosen = chosen.to(torch.int32) << shift
    return str(_sum(bits) << shift).encode() + chosen.view(torch.uint8).numpy().tobytes()


def _sum(bits: torch.Tensor) -> int:
    # On a CPU numpy takes a fifteenth of the time that torch takes for it.
    if bits.device.type == "cpu":
        return int(bits.numpy().sum(dtype=np.int64))
    return int(bits.sum(dtype=torch.int64))
