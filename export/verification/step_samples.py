"""Inputs to verify a step graph with, where a caller has none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from qinvert.chunk_step.ports import (
    BETA,
    KEY,
    LOG_DECAY,
    QUERY,
    STATE,
    VALUE,
    StepSizes,
    state_grid,
    step_sizes,
)
from qinvert.execution.value_channels import leave
from qinvert.export.step_heads import one_head
from qinvert.export.step_interface import VALID, StepInterface
from qinvert.export.verification.step_inputs import joined_heads
from qinvert.plan.plan import LayerPlan

#: Largest log decay of a token, in magnitude: a state keeps about half of itself over a few tokens.
MAX_DECAY = 0.2
#: Share of the largest value of a grid that random values have as their standard deviation.
SHARE = 0.25


def step_samples(
    plan: LayerPlan, interface: StepInterface, calls: int = 8, seed: int = 0
) -> dict[str, npt.NDArray[np.float32]]:
    """Return random inputs of one batch over several calls, the last of which is not full.

    There is one call where the state cannot go from call to call.

    Keys have norm 1 and queries are scaled, unless the graph does that.  Values and
    the state fill a part of their grids.
    """
    rng, sizes = np.random.default_rng(seed), step_sizes(plan.program)
    calls = calls if interface.hands_on else 1
    front, tokens = (interface.batch, interface.heads), calls * interface.tokens(plan)
    q, k = (rng.standard_normal((*front, tokens, sizes.key_size)) for _ in range(2))
    if not interface.normalize:
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        q = q * sizes.key_size**-0.5
    decays = (*front, tokens, sizes.key_size) if sizes.per_channel else (*front, tokens)
    valid = np.ones((interface.batch, tokens))
    valid[:, tokens - interface.tokens(plan) // 2 :] = 0
    found = {
        QUERY: q,
        KEY: k,
        VALUE: _values(rng, plan, interface, sizes, VALUE, tokens),
        BETA: rng.random((*front, tokens)),
        LOG_DECAY: -MAX_DECAY * rng.random(decays),
        STATE: _values(rng, plan, interface, sizes, STATE, sizes.key_size),
        VALID: valid,
    }
    turned = sizes.key_ports if interface.keys_first else ()
    arrays = {name: np.asarray(x).swapaxes(-1, -2) if name in turned else x for name, x in found.items()}
    return {name: np.ascontiguousarray(x, dtype=np.float32) for name, x in arrays.items()}


def heads_samples(plans: Sequence[LayerPlan], interface: StepInterface) -> dict[str, npt.NDArray[np.float32]]:
    """Return `step_samples` of a layer, those of each head on its own grids where heads have plans."""
    if len(plans) == 1:
        return step_samples(plans[0], interface)
    return joined_heads([step_samples(plan, one_head(interface), seed=i) for i, plan in enumerate(plans)])


def _values(
    rng: np.random.Generator,
    plan: LayerPlan,
    interface: StepInterface,
    sizes: StepSizes,
    port: str,
    rows: int,
) -> npt.NDArray[np.float32]:
    grid = state_grid(plan) if port == STATE else plan.tensors[port]
    inside = (
        SHARE
        * grid.limit
        * rng.standard_normal((interface.batch, interface.heads, rows, sizes.value_size), dtype=np.float32)
    )
    reals = leave(plan.channels, torch.from_numpy(inside)).numpy()
    return np.swapaxes(reals, -1, -2) if interface.values_first else reals
