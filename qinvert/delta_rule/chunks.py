"""The chunks of a delta rule: the triangular systems, and how their solutions act on values and state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, cast

import torch

from qinvert.delta_rule.from_keys import cumulative, decayed_products, from_keys
from qinvert.systems import Systems

#: Whether a model is being traced.  torch before 2.7 cannot tell, and cannot export our models.
_is_exporting: Final[Callable[[], bool]] = getattr(torch.compiler, "is_exporting", lambda: False)


class Applied(Protocol):
    """T as a matrix, or another object that computes ``T @ b``."""

    def __matmul__(self, right: torch.Tensor, /) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkOutputs:
    """The results of the chunks of one layer."""

    #: Outputs ``[B, H, N, C, Dv]``.
    out: torch.Tensor
    #: State after the last chunk, ``[B, H, Dk, Dv]``.
    state: torch.Tensor
    #: ``U = T (beta v)``, ``[B, H, N, C, Dv]``; None where a step does not form it.
    u: torch.Tensor | None = None
    #: ``W = T (beta k exp(G))``, ``[B, H, N, C, Dk]``; None where a step does not form it.
    w: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeltaChunks:
    """Inputs of a gated delta rule, cut into chunks; all float32.

    L and the right-hand sides follow from them and are computed when asked for.
    """

    #: Scaled queries, ``[B, H, N, C, Dk]``.
    q: torch.Tensor
    #: Keys as they enter the products, ``[B, H, N, C, Dk]``.
    k: torch.Tensor
    #: Values, ``[B, H, N, C, Dv]``.
    v: torch.Tensor
    #: Log decay, ``[B, H, N, C]``, or ``[B, H, N, C, Dk]`` with one decay per channel.
    g: torch.Tensor
    #: ``[B, H, N, C]``.
    beta: torch.Tensor
    #: State before the first chunk, ``[B, H, Dk, Dv]``.
    state: torch.Tensor

    def replaced(self, inputs: Callable[[torch.Tensor], torch.Tensor], state: torch.Tensor) -> DeltaChunks:
        """Return chunks with ``inputs`` of q, k, v, g and beta, and this state."""
        return DeltaChunks(
            q=inputs(self.q),
            k=inputs(self.k),
            v=inputs(self.v),
            g=inputs(self.g),
            beta=inputs(self.beta),
            state=state,
        )

    @property
    def lower(self) -> torch.Tensor:
        """``L``, ``[B, H, N, C, C]``."""
        return from_keys(self.k, self.beta, self.g)

    @property
    def systems(self) -> Systems:
        """L and beta as one value."""
        return Systems(lower=self.lower, beta=self.beta)

    @property
    def gram(self) -> torch.Tensor:
        """``<k_i, k_j>``, ``[B, H, N, C, C]``: L without beta, decay and mask."""
        return self.k @ self.k.mT

    @property
    def decays(self) -> torch.Tensor:
        """``G``, with an axis of channels: ``[B, H, N, C, 1]`` or ``[B, H, N, C, Dk]``."""
        total = cumulative(self.g, self.k)
        return total.unsqueeze(-1) if total.ndim < self.k.ndim else total

    @property
    def right_hand_sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``beta v`` and ``beta k exp(G)``: T times these are U and W."""
        beta = self.beta.unsqueeze(-1)
        return self.v * beta, self.k * beta * torch.exp(self.decays)

    def apply(self, t: Applied) -> ChunkOutputs:
        """``U = T (beta v)``, ``W = T (beta k exp(G))``, then from chunk to chunk, with V = U - W S:

        O = (q exp(G)) S + tril(q k^T exp(G_i - G_j)) V
        S <- exp(G_C) S + (k exp(G_C - G))^T V
        """
        u, w, parts = self._parts(t)
        state, out = _scan(self.state, parts)
        return ChunkOutputs(u=u, w=w, out=out.movedim(0, 2), state=state)

    def states(self, t: Applied) -> torch.Tensor:
        """Return the state before every chunk, ``[B, H, N, Dk, Dv]``."""
        states, state = [], self.state
        for chunk in zip(*(part.movedim(2, 0) for part in self._parts(t)[2]), strict=True):
            states.append(state)
            state, _ = _step(state, chunk)
        return torch.stack(states, 2)

    def _parts(self, t: Applied) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """U, W, and what the steps from chunk to chunk take."""
        values, keys = self.right_hand_sides
        u, w = t @ values, t @ keys
        total = self.decays
        scores = torch.tril(decayed_products(self.q, self.k, cumulative(self.g, self.k)))
        last = total[..., -1:, :]
        reads, writes = self.q * torch.exp(total), self.k * torch.exp(last - total)
        # One factor per channel, also where channels share it: in a scan, 1 is not a size of its own.
        kept = torch.exp(last[..., 0, :]).expand(*writes.shape[:3], writes.shape[-1])
        return u, w, (u, w, reads, scores, writes, kept)


def _step(state: torch.Tensor, chunk: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """State after one chunk, and its outputs."""
    u, w, reads, scores, writes, kept = chunk
    fresh = u - w @ state
    return state * kept[..., None] + writes.mT @ fresh, reads @ state + scores @ fresh


def _scan(state: torch.Tensor, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Last state, and the outputs of all chunks, chunks first."""
    chunks = tuple(part.movedim(2, 0) for part in parts)
    if _is_exporting():
        # A loop would fix the number of chunks in the graph to that of the example.
        from torch._higher_order_ops.scan import scan

        return cast("tuple[torch.Tensor, torch.Tensor]", scan(_step, state, chunks))
    outputs = []
    for chunk in zip(*chunks, strict=True):
        state, out = _step(state, chunk)
        outputs.append(out)
    return state, torch.stack(outputs)


#: ``inverse(chunks) -> T``, from all that the chunks hold; or the results of the whole step.
ChunkInverse = Callable[[DeltaChunks], Applied | ChunkOutputs]
