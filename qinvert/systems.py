"""The triangular systems of a layer: L, and beta where it is known, as one value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch

from qinvert.errors import InputError
from qinvert.matrices import check_beta, check_matrices, solve

#: Axis of L that counts heads: ``[batch, heads, chunks, C, C]``, or without the batch.
HEAD_AXIS: Final = -4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Systems:
    """Systems ``(I + L) x = b``, with the beta that L was built with.

    Invariant: both were checked, see `checked`; ``beta`` has one number for
    every row of ``lower``.
    """

    #: L, ``(..., C, C)``.
    lower: torch.Tensor
    #: ``(..., C)``; None where it is not known, or not needed.
    beta: torch.Tensor | None = None

    @staticmethod
    def checked(lower: object, beta: object = None, *, chunk: int | None = None, where: str = "") -> Systems:
        """Check matrices of any origin and return their systems.

        Parameters
        ----------
        lower, beta
            Tensors or arrays ``(..., C, C)`` and ``(..., C)``.
        chunk : int, optional
            The C that is expected.
        where : str
            Text that messages add to ``L`` and ``beta``, such as ``" of layer 'x'"``.

        Raises
        ------
        InputError
            See `qinvert.matrices.check_matrices` and `check_beta`.
        """
        matrices = check_matrices(lower, chunk, f"L{where}")
        rows = None if beta is None else check_beta(beta, matrices, f"beta{where}")
        return Systems(lower=matrices, beta=rows)

    @property
    def chunk(self) -> int:
        """Size C."""
        return int(self.lower.shape[-1])

    @property
    def count(self) -> int:
        """Number of matrices."""
        return self.lower.shape[:-2].numel()

    @property
    def has_heads(self) -> bool:
        """Whether the matrices have an axis of heads."""
        return self.lower.ndim >= -HEAD_AXIS

    def flat(self) -> Systems:
        """Return the same systems with one axis for all: ``[N, C, C]`` and ``[N, C]``."""
        size = self.chunk
        beta = None if self.beta is None else self.beta.reshape(-1, size)
        return Systems(lower=self.lower.reshape(-1, size, size), beta=beta)

    @property
    def is_filled(self) -> torch.Tensor:
        """Which of flat systems have an L that is not all zero, as padding gives it."""
        return (self.lower != 0).flatten(1).any(1)

    def heads(self) -> Iterator[Systems]:
        """Yield the systems of every head.

        Raises
        ------
        InputError
            If the matrices have no axis of heads.
        """
        if not self.has_heads:
            raise InputError(
                f"L has shape {list(self.lower.shape)}, without a head axis; pass (..., heads, chunks, C, C)"
            )
        for head, lower in enumerate(self.lower.unbind(HEAD_AXIS)):
            yield Systems(
                lower=lower, beta=None if self.beta is None else self.beta.select(HEAD_AXIS + 1, head)
            )

    def __getitem__(self, index: slice | torch.Tensor) -> Systems:
        """Return a part of flat systems, chosen by a slice, a mask or indices of the first axis."""
        return Systems(lower=self.lower[index], beta=None if self.beta is None else self.beta[index])

    def to(self, dtype: torch.dtype) -> Systems:
        """Return the systems in another dtype."""
        beta = None if self.beta is None else self.beta.to(dtype)
        return Systems(lower=self.lower.to(dtype), beta=beta)

    def inverse(self) -> torch.Tensor:
        """``T = (I + L)^-1`` by a float64 triangular solve, ``(..., C, C)``."""
        return solve(self.lower)
