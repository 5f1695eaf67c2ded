"""What every tensor of a chunk step holds over a pass of data, and a sample of sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from qinvert.calibration.chunk_steps.decoded_tokens import observe_decoding
from qinvert.chunk_step.ports import STATE, VALUE, step_sizes
from qinvert.delta_rule.chunks import DeltaChunks
from qinvert.execution.chunk_steps import run_float
from qinvert.plan.value_channels import ValueChannels
from qinvert.program.program import Program

#: Elements of all values of a sample: candidates are simulated on it.
SAMPLE_ELEMENTS: Final = 2**21
#: Most chunks of a sequence in a sample.
SAMPLE_CHUNKS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observed:
    """Statistics of one layer, as data that merge exactly: maxima, counts and a sample."""

    #: max|x| of every tensor: ``[H, Dv]`` where it has value channels, else ``[H, 1]``.
    largest: dict[str, torch.Tensor]
    #: max|S| after each chunk of a sequence, over all sequences.
    state_growth: tuple[float, ...]
    tokens: int
    #: Longest sequence in tokens.
    longest: int
    #: Chunks of the first sequences; None where another process has seen them.
    sample: DeltaChunks | None

    @property
    def heads(self) -> int:
        """Number of heads of the layer."""
        return len(self.largest[VALUE])


class ChunkObserver:
    """Runs a program of the step in float32 on all chunks of a layer, and keeps what it holds.

    It runs chunk by chunk as in prefill, and token by token as in decoding: both have the same grids.

    Parameters
    ----------
    program : Program
        A chunk step.
    rotated : bool
        Whether values are multiplied by Hadamard's matrix first.
    """

    def __init__(self, program: Program, *, rotated: bool = False) -> None:
        self.program, self.sizes = program, step_sizes(program)
        unscaled = ((0,) * self.sizes.value_size,)
        self._channels = ValueChannels(exponents=unscaled, rotated=True) if rotated else None
        self._values = program.depends_on(VALUE, STATE)
        self._largest: dict[str, torch.Tensor] = {}
        self._growth: list[float] = []
        self._longest = 0
        #: Tokens seen so far.
        self.tokens = 0
        self._sample: DeltaChunks | None = None
        self._heads = self._chunks = self._written = 0
        self._new_state = next(port.tensor for port in program.outputs if port.name == STATE)

    def update(self, chunks: DeltaChunks, sampled: bool) -> torch.Tensor:
        """Add the chunks of one forward pass, as a sample, too, if wanted; return the outputs."""
        self._heads, self._chunks = chunks.beta.shape[1:3]
        self._written = 0
        result = run_float(self.program, chunks, observe=self._observe, channels=self._channels)
        observe_decoding(self.program, chunks, self._keep, self._channels)
        batch, _, number, size = chunks.beta.shape
        self.tokens += batch * number * size
        self._longest = max(self._longest, number * size)
        if sampled and self._sample is None:
            self._sample = first_sequences(chunks)
        return result.out

    def _observe(self, name: str, values: torch.Tensor) -> None:
        if name == self._new_state:
            self._grow(float(_largest(values, (0, 1, 2, 3))))
        self._keep(name, values)

    def _keep(self, name: str, values: torch.Tensor) -> None:
        axes = (0, 2, 3) if name not in self._values else (0, 3) if self.sizes.values_first else (0, 2)
        found = _largest(values, axes).reshape(-1, self._heads, self._width(name)).amax(0)
        # A NaN would hide in a maximum; it counts as infinite.
        found = torch.nan_to_num(found.to("cpu", torch.float32), nan=torch.inf)
        known = self._largest.get(name)
        self._largest[name] = found if known is None else torch.maximum(known, found)

    def _width(self, name: str) -> int:
        return self.sizes.value_size if name in self._values else 1

    def _grow(self, largest: float) -> None:
        # Sequences come in parts, each from its first chunk to its last.
        index = self._written % self._chunks
        if index == len(self._growth):
            self._growth.append(0.0)
        self._growth[index] = max(self._growth[index], largest)
        self._written += 1

    def observed(self) -> Observed:
        """Return what was seen so far."""
        return Observed(
            largest=dict(self._largest),
            state_growth=tuple(self._growth),
            tokens=self.tokens,
            longest=self._longest,
            sample=self._sample,
        )


def _largest(values: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    # max|x| without a copy of |x|, which takes 5 to 30 times as long.
    return torch.maximum(values.amax(axes), -values.amin(axes))


def merged(parts: list[Observed]) -> Observed:
    """Return the statistics of one observer that saw all data, from observers that shared them."""
    seen = [part for part in parts if part.tokens]
    largest = dict(seen[0].largest)
    for part in seen[1:]:
        largest = {name: torch.maximum(x, part.largest[name]) for name, x in largest.items()}
    longest = max(len(part.state_growth) for part in seen)
    growth = [
        max(part.state_growth[i] for part in seen if i < len(part.state_growth)) for i in range(longest)
    ]
    return Observed(
        largest=largest,
        state_growth=tuple(growth),
        tokens=sum(part.tokens for part in seen),
        longest=max(part.longest for part in seen),
        sample=next((part.sample for part in seen if part.sample is not None), None),
    )


def first_sequences(chunks: DeltaChunks) -> DeltaChunks:
    """Return a copy of the first chunks of the first sequences, as many as a sample may hold.

    Padding says nothing of a plan: sequences without a key are left out, the others begin with the
    chunk of their first key, and no chunk is kept beyond the last key of all.
    """
    _, heads, number, size, channels = chunks.v.shape
    filled = (chunks.k != 0).any(-1).any(-1).any(1)
    if not bool(filled.any()):
        filled = torch.ones_like(filled)
    rows = filled.any(1).nonzero().squeeze(1)
    rows = rows[: max(1, SAMPLE_ELEMENTS // (heads * min(number, SAMPLE_CHUNKS) * size * channels))]
    first, last = _ends(filled[rows])
    kept = min(SAMPLE_CHUNKS, int((last - first).max()) + 1)
    first = first.clamp(max=number - kept)
    places = first[:, None] + torch.arange(kept, device=first.device)

    def cut(x: torch.Tensor) -> torch.Tensor:
        # The two indices stand apart, so that their axes come first.
        return x[rows[:, None], :, places].movedim(2, 1).to("cpu", torch.float32, copy=True).contiguous()

    state = _decayed(chunks.state[rows], chunks.g[rows], first)
    return chunks.replaced(cut, state.to("cpu", torch.float32, copy=True))


def _ends(filled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last filled chunk of every sequence of ``[B, N]``, each with one at least."""
    places = torch.arange(filled.shape[1], device=filled.device)
    return (
        places.masked_fill(~filled, filled.shape[1]).amin(1),
        places.masked_fill(~filled, -1).amax(1),
    )


def _decayed(state: torch.Tensor, g: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """State before the chunk ``first`` of every sequence; chunks without keys do nothing but decay it."""
    before = torch.arange(g.shape[2], device=g.device) < first[:, None]
    total = torch.einsum("bhnc...,bn->bh...", g, before.to(g.dtype))
    return state * torch.exp(total.reshape(*state.shape[:2], -1, 1))
