"""`qinvert.LayerPlan.step`: checks what a caller passes, and cuts it into chunks."""

from __future__ import annotations

from typing import TypeVar, cast

import torch

from qinvert.chunk_step.ports import BETA, STATE, StepSizes, step_sizes
from qinvert.delta_rule.chunks import DeltaChunks
from qinvert.delta_rule.rule import in_chunks, normalized
from qinvert.errors import InputError
from qinvert.execution.chunk_steps import run_integers
from qinvert.matrices import as_tensor, like
from qinvert.numerics.law import Rounding
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.plan.value_channels import ValueChannels

M = TypeVar("M")


def step(
    plan: QuantizedProgram,
    channels: ValueChannels | None,
    q: M,
    k: M,
    v: M,
    g: M,
    beta: M,
    state: M | None = None,
    *,
    valid: M | None = None,
    normalize: bool = False,
    rounding: str = "onnx",
) -> tuple[M, M]:
    """See `qinvert.LayerPlan.step`."""
    chosen, sizes = Rounding.named(rounding), step_sizes(plan.program)
    given = (q, k, v, g, beta, state)
    with torch.no_grad():
        chunks, tokens = cut(sizes, *given, valid, normalize)
        _check_beta(chunks.beta, plan)
        result = run_integers(plan, chunks, channels, chosen)
        out = result.out.flatten(2, 3)[:, :, :tokens].contiguous()
    return cast("M", like(out, *given)), cast("M", like(result.state, *given))


def cut(
    sizes: StepSizes,
    q: object,
    k: object,
    v: object,
    g: object,
    beta: object,
    state: object | None,
    valid: object | None,
    normalize: bool,
) -> tuple[DeltaChunks, int]:
    """Return checked inputs in float32, cut into chunks and padded, and the number of tokens.

    Raises
    ------
    InputError
        With what was given and what fits.
    """
    given = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    x = {name: as_tensor(value, name).to(torch.float32) for name, value in given.items()}
    old = None if state is None else as_tensor(state, STATE).to(torch.float32)
    _check_shapes(sizes, x, old)
    _check_values(x, old)
    batch, heads, tokens = x["beta"].shape
    if valid is not None:
        mask = as_tensor(valid, "valid").to(x["beta"])
        if mask.shape != (batch, tokens) or not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError(f"valid has shape {list(mask.shape)}; pass 0 and 1, {[batch, tokens]}")
        x["beta"] = x["beta"] * mask[:, None]
        x["g"] = x["g"] * (mask[:, None] if x["g"].ndim == 3 else mask[:, None, :, None])
    if normalize:
        x["q"], x["k"] = normalized(x["q"]) * sizes.key_size**-0.5, normalized(x["k"])
    if old is None:
        old = x["v"].new_zeros(batch, heads, sizes.key_size, sizes.value_size)
    cuts = {name: in_chunks(value, sizes.chunk) for name, value in x.items()}
    return DeltaChunks(**cuts, state=old), tokens


def _check_shapes(sizes: StepSizes, x: dict[str, torch.Tensor], state: torch.Tensor | None) -> None:
    front = x["beta"].shape
    keys, values = sizes.key_size, sizes.value_size
    wanted = {
        "q": (*front, keys),
        "k": (*front, keys),
        "v": (*front, values),
        "g": (*front, keys) if sizes.per_channel else tuple(front),
    }
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in x.items())
    fits = all(tuple(x[name].shape) == shape for name, shape in wanted.items())
    if len(front) != 3 or 0 in front or not fits:
        decays = "[B, H, T, Dk]" if sizes.per_channel else "[B, H, T]"
        raise InputError(
            f"{shapes} do not fit; pass q, k [B, H, T, {keys}], v [B, H, T, {values}], g {decays} and "
            "beta [B, H, T] with T > 0"
        )
    if state is not None and tuple(state.shape) != (*front[:2], keys, values):
        raise InputError(f"state has shape {list(state.shape)}; pass {[*front[:2], keys, values]}")


def _check_values(x: dict[str, torch.Tensor], state: torch.Tensor | None) -> None:
    for name, value in {**x, **({} if state is None else {STATE: state})}.items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{name} holds NaN or Inf values; look for them upstream")
    if float(x["g"].max()) > 0:
        raise InputError(f"g reaches {float(x['g'].max()):.3g}; pass log decays, which are at most 0")


def _check_beta(beta: torch.Tensor, plan: QuantizedProgram) -> None:
    # A step of the grid above its end still rounds onto it.
    grid = plan.tensors[BETA]
    low, high = (float(end) for end in torch.aminmax(beta))
    if low < 0 or high > grid.limit + grid.scale:
        raise InputError(
            f"beta goes from {low:.3g} to {high:.3g}; the plan was made for [0, {grid.limit:.3g}]; calibrate "
            "on data of this layer"
        )
