"""What a chunk step holds when it decodes: the state is read behind every token, not behind every chunk.

Inside a chunk, what the old state predicts lacks the tokens of the chunk, which T adds later.  A decoded
token finds them in its state: where keys return, its predictions are several times as large.  And a sequence
may end inside a chunk, where a state can be larger than behind any chunk.
"""

from __future__ import annotations

from typing import Final

import torch

from qinvert.chunk_step.ports import beyond_decays
from qinvert.chunk_step.single_token import single_token_program
from qinvert.delta_rule.chunks import DeltaChunks
from qinvert.execution.chunk_steps import Observer, entered, run_float
from qinvert.matrices import SolvedInverse
from qinvert.plan.value_channels import ValueChannels
from qinvert.program.program import Program

#: Elements of all states that tokens of one pass are decoded from, at most: 8 chunks of
#: 16 heads of 128 x 128.
STATE_ELEMENTS: Final = 2**21


def observe_decoding(
    program: Program, chunks: DeltaChunks, observe: Observer, channels: ValueChannels | None = None
) -> None:
    """Run the tokens of chunks one by one in float32, each chunk from the state before it.

    All chunks run at once, as many as `STATE_ELEMENTS` allows, spread evenly over the sequences.

    Parameters
    ----------
    program : Program
        A chunk step; its tokens run by `single_token_program`, or by itself where there is none.
    chunks : DeltaChunks
    observe : callable
        See `qinvert.execution.chunk_steps.Observer`; it receives the tensors of ``program``
        that do not follow from log decays alone: decays reach 1 on every grid.
    channels : ValueChannels, optional
        What happens to values before they enter.
    """
    single = single_token_program(program) or program
    # Once, and not for every token: rotations of a state cost more than its update.
    starts = entered(_chosen(chunks), channels)
    wanted = beyond_decays(program)

    def observe_wanted(name: str, values: torch.Tensor) -> None:
        if name in wanted:
            observe(name, values)

    state = starts.state
    for place in range(starts.beta.shape[-1]):
        token = _token(starts, place, single.chunk, state)
        state = run_float(single, token, observe=observe_wanted).state


def _chosen(chunks: DeltaChunks) -> DeltaChunks:
    """Return chunks as sequences of their own, ``[n, H, 1, C, ...]``, with the states before them."""
    states = chunks.states(SolvedInverse(chunks.lower)).transpose(1, 2).flatten(0, 1)
    kept = max(1, min(len(states), STATE_ELEMENTS // states[0].numel()))
    places = torch.arange(kept, dtype=torch.int64, device=states.device) * len(states) // kept
    return chunks.replaced(lambda x: x.transpose(1, 2).flatten(0, 1)[places].unsqueeze(2), states[places])


def _token(chunks: DeltaChunks, place: int, size: int, state: torch.Tensor) -> DeltaChunks:
    """Return chunks of ``size`` with one token each: behind it, ``k = v = beta = g = 0``."""

    def alone(x: torch.Tensor) -> torch.Tensor:
        padded = torch.zeros(*x.shape[:3], size, *x.shape[4:], dtype=x.dtype, device=x.device)
        padded[:, :, :, 0] = x[:, :, :, place]
        return padded

    return chunks.replaced(alone, state)
