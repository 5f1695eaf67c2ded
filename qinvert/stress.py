"""Generators of ``L`` by name, each with a property that can break an inverse.

Every generator takes ``(count, chunk, seed)`` and returns float32 matrices
``[count, chunk, chunk]``, strictly lower triangular.  Those built from keys,
``L[i, j] = beta_i <k_i, k_j> exp(G_i - G_j)``, use unit keys, so the bounds
``|L|, |T| <= max(beta)`` hold for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from qinvert.checks import check_integer, check_seed
from qinvert.delta_rule.from_keys import from_keys as from_keys
from qinvert.errors import InputError, lookup
from qinvert.program.steps import check_chunk

Generator = Callable[[int, int, int], torch.Tensor]

#: Largest number of matrices that one call makes.
MAX_COUNT = 2**24
#: Length of the synthetic keys.
KEY_SIZE = 64


def unit_keys(
    count: int, chunk: int, cosine: float, generator: torch.Generator, size: int = KEY_SIZE
) -> torch.Tensor:
    """Unit keys ``[count, chunk, size]`` whose expected pairwise cosine is about ``cosine``."""
    shared = torch.randn(count, 1, size, generator=generator, dtype=torch.float32)
    own = torch.randn(count, chunk, size, generator=generator, dtype=torch.float32)
    keys = cosine**0.5 * shared + (1 - cosine) ** 0.5 * own
    return torch.nn.functional.normalize(keys, dim=-1)


def stress_keys(count: int, chunk: int, size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return ``k [N, chunk, size]``, ``beta`` and ``g [N, chunk]`` for `from_keys`.

    There are ``count`` matrices for each of four cosines of the keys, from
    independent to equal ones.  Decays range from none to forgetting everything at
    once.
    """
    generator = torch.Generator().manual_seed(seed)
    k = torch.cat([unit_keys(count, chunk, cosine, generator, size) for cosine in (0.0, 0.5, 0.97, 1.0)])
    level = torch.exp(_uniform((math.log(1e-4), math.log(166.0)), (len(k), 1), generator))
    return {
        "k": k,
        "beta": _uniform((0.0, 1.0), (len(k), chunk), generator),
        "g": -level * _uniform((0.0, 1.0), (len(k), chunk), generator),
    }


def _keyed(cosine: float, beta: tuple[float, float], g: tuple[float, float]) -> Generator:
    def generate(count: int, chunk: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        k = unit_keys(count, chunk, cosine, generator)
        strengths = _uniform(beta, (count, chunk), generator)
        return from_keys(k, strengths, _uniform(g, (count, chunk), generator))

    return generate


def _uniform(span: tuple[float, float], shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    low, high = span
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float32)


def _scaled_random(factor: float) -> Generator:
    def generate(count: int, chunk: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.tril(
            factor * torch.rand(count, chunk, chunk, generator=generator, dtype=torch.float32), -1
        )

    return generate


def _rows_of_beta(count: int, chunk: int, seed: int) -> torch.Tensor:
    beta = torch.rand(count, chunk, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return torch.tril(beta.expand(count, chunk, chunk), -1)


def _filled_blocks(count: int, chunk: int, _seed: int) -> torch.Tensor:
    index = torch.arange(chunk) // min(16, chunk)
    same_block = index.unsqueeze(0) == index.unsqueeze(1)
    return torch.tril(1.45 * same_block.to(torch.float32), -1).repeat(count, 1, 1)


def _wide_gates(count: int, chunk: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = unit_keys(count, chunk, 0.7, generator)
    # One level of decay per matrix, log-uniform from -1e-4 to -166, as in heads of trained models.
    level = torch.exp(_uniform((math.log(1e-4), math.log(166.0)), (count, 1), generator))
    beta = _uniform((0.0, 1.0), (count, chunk), generator)
    return from_keys(k, beta, -level * torch.rand(count, chunk, generator=generator, dtype=torch.float32))


def _per_channel_decay(count: int, chunk: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = unit_keys(count, chunk, 0.7, generator)
    # One level of decay per channel, log-uniform from -1e-4 to -0.2.
    level = torch.exp(_uniform((math.log(1e-4), math.log(0.2)), (count, 1, KEY_SIZE), generator))
    beta = _uniform((0.0, 1.0), (count, chunk), generator)
    return from_keys(
        k, beta, -level * torch.rand(count, chunk, KEY_SIZE, generator=generator, dtype=torch.float32)
    )


def _zero_rows(count: int, chunk: int, seed: int) -> torch.Tensor:
    lower = _keyed(0.5, (0.0, 1.0), (-0.1, 0.0))(count, chunk, seed)
    lower[:, chunk // 2 + 1 :] = 0
    return lower


def _outlier(count: int, chunk: int, seed: int) -> torch.Tensor:
    lower = 0.05 * _keyed(0.5, (0.0, 1.0), (-0.1, 0.0))(count, chunk, seed)
    lower[0, chunk // 2, chunk // 4] = 1.0
    return lower


#: Every generator by name.
STRESS: dict[str, Generator] = {
    # Uniform entries up to 0.5, which published tables use.
    "half_random": _scaled_random(0.5),
    # Small entries: every method works.
    "small_random": _scaled_random(0.1),
    # Worst case of the powers: binomial growth.
    "ones": _keyed(1.0, (1.0, 1.0), (0.0, 0.0)),
    # One key, varying strength, no decay: L[i, j] = beta_i.
    "beta_ones": _rows_of_beta,
    # A block of 16 equal entries above 1: the inverse alternates.
    "filled_blocks": _filled_blocks,
    # The same token again and again.
    "repeated_keys": _keyed(1.0, (0.835, 0.835), (-1e-3, -1e-3)),
    # Nearly the same key at full strength.
    "correlated_keys": _keyed(0.97, (1.0, 1.0), (-0.02, -0.02)),
    # Independent keys: easy, as in many unit tests.
    "independent_keys": _keyed(0.0, (0.0, 1.0), (-0.1, 0.0)),
    # beta up to 2: negative eigenvalues.
    "negative_eigenvalues": _keyed(0.3, (0.0, 2.0), (-0.05, 0.0)),
    # From no decay to forgetting everything at once.
    "wide_gates": _wide_gates,
    # Every channel of the keys forgets at its own rate (KDA).
    "per_channel_decay": _per_channel_decay,
    # The padded tail of a sequence.
    "zero_rows": _zero_rows,
    # One entry far above the rest.
    "outlier": _outlier,
}

#: Largest beta of the generators that are built from unit keys.
MAX_BETA: dict[str, float] = {
    "ones": 1.0,
    "beta_ones": 1.0,
    "repeated_keys": 0.835,
    "correlated_keys": 1.0,
    "independent_keys": 1.0,
    "negative_eigenvalues": 2.0,
    "wide_gates": 1.0,
    "per_channel_decay": 1.0,
    "zero_rows": 1.0,
}


def stress_matrices(name: str, count: int = 16, chunk: int = 64, seed: int = 0) -> torch.Tensor:
    """Return ``count`` matrices of the named kind, float32 ``[count, chunk, chunk]``.

    Raises
    ------
    InputError
        If there is no such generator; the message lists them.
    """
    check_integer("count", count, 1, MAX_COUNT, InputError)
    check_seed(seed, InputError)
    check_chunk(chunk)
    return lookup(STRESS, name, "stress set", InputError)(count, chunk, seed)
