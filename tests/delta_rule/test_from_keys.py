from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qinvert
from qinvert.delta_rule.from_keys import decayed_products, from_dplr, from_keys
from qinvert.errors import InputError
from qinvert.matrices import solve


def drawn(chunk, channels, strength, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 2, chunk, channels, generator=generator) / channels**0.5
    return x, y, -strength * torch.rand(2, chunk, channels, generator=generator)


def all_pairs(left, right, rows, total):
    """The definition, in float64: every pair and channel by its difference."""
    gaps = (rows.unsqueeze(-2) - total.unsqueeze(-3)).clamp(max=0)
    return (left.double().unsqueeze(-2) * right.double().unsqueeze(-3) * torch.exp(gaps)).sum(-1)


def test_from_keys_is_its_formula():
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    beta, g = (torch.rand(2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    lower = from_keys(k, beta, -g)
    for b in range(2):
        for i in range(5):
            for j in range(5):
                decay = math.exp(-float(g[b, j + 1 : i + 1].sum()))
                expected = float(beta[b, i] * (k[b, i] @ k[b, j])) * decay if j < i else 0.0
                assert float(lower[b, i, j]) == pytest.approx(expected, abs=1e-12)


def test_from_keys_with_a_decay_per_channel_is_its_formula():
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    beta = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    g = -torch.rand(2, 5, 3, generator=generator, dtype=torch.float64)
    lower = from_keys(k, beta, g)
    for b in range(2):
        for i in range(5):
            for j in range(5):
                decays = torch.exp(g[b, j + 1 : i + 1].sum(0))
                expected = float(beta[b, i] * (k[b, i] * k[b, j] * decays).sum()) if j < i else 0.0
                assert float(lower[b, i, j]) == pytest.approx(expected, abs=1e-12)


def test_equal_decay_in_all_channels_is_one_decay_a_head():
    generator = torch.Generator().manual_seed(2)
    k, beta = torch.randn(2, 3, 16, 8, generator=generator), torch.rand(2, 3, 16, generator=generator)
    g = -torch.rand(2, 3, 16, generator=generator)
    per_channel = from_keys(k, beta, g.unsqueeze(-1).expand(k.shape))
    assert torch.allclose(per_channel, from_keys(k, beta, g), rtol=0, atol=1e-5)


def test_strong_decay_in_some_channels_leaves_the_others():
    k, beta = torch.ones(1, 8, 2), torch.ones(1, 8)
    g = torch.tensor([-1e4, 0.0]).expand(1, 8, 2)
    assert torch.equal(from_keys(k, beta, g), torch.tril(torch.ones(1, 8, 8), -1))


def test_strong_decay_overflows_nowhere():
    k = torch.ones(1, 8, 1)
    lower = from_keys(k, torch.ones(1, 8), torch.full((1, 8), -1e4))
    assert torch.equal(lower, torch.zeros(1, 8, 8))


@given(
    chunk=st.integers(1, 40) | st.just(64),
    channels=st.integers(1, 6),
    strength=st.sampled_from([0.0, 0.1, 5.0, 100.0, 1e30]),
    seed=st.integers(0, 2**31),
)
def test_products_by_halves_are_those_of_all_pairs(chunk, channels, strength, seed):
    left, right, g = drawn(chunk, channels, strength, seed)
    total = torch.cumsum(g, -2)
    # G itself is rounded: compare from the same G, with room for the differences of large ones.
    expected = torch.tril(all_pairs(left, right, total.double(), total.double()))
    found = torch.tril(decayed_products(left, right, total))
    room = 1e-6 * (1 + float(total.abs().max()) if strength < 1e3 else 1)
    assert torch.allclose(found.double(), expected, rtol=0, atol=room)


@given(chunk=st.integers(1, 40), strength=st.sampled_from([0.0, 0.5, 20.0, 1e30]), seed=st.integers(0, 2**31))
def test_low_rank_products_leave_out_their_own_decay(chunk, strength, seed):
    a, b, g = drawn(chunk, 4, strength, seed)
    total = torch.cumsum(g, -2)
    before = torch.cat([torch.zeros_like(g[:, :1]), total[:, :-1]], 1).double()
    expected = torch.tril(-all_pairs(a, b, before, total.double()), -1)
    room = 1e-6 * (1 + float(total.abs().max()) if strength < 1e3 else 1)
    assert torch.allclose(from_dplr(a, b, g).double(), expected, rtol=0, atol=room)


def token_by_token(a, b, k, v, g, state):
    """``S <- diag(exp(g)) S + b (a^T S) + k v^T``: the reads a^T S, and the last state."""
    reads = []
    for t in range(len(a)):
        reads.append(a[t] @ state)
        state = torch.exp(g[t]).unsqueeze(-1) * state + torch.outer(b[t], reads[-1]) + torch.outer(k[t], v[t])
    return torch.stack(reads), state


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
@pytest.mark.parametrize("per_channel", [True, False])
def test_the_inverse_of_a_low_rank_recurrence_gives_its_reads(chunk, per_channel):
    generator = torch.Generator().manual_seed(chunk)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # RWKV-7: a unit removal key, and a learning rate in (0, 1).
    removal = torch.nn.functional.normalize(draw(chunk, 8), dim=-1)
    a, b = -removal, removal * torch.sigmoid(draw(chunk, 8))
    k, v, start = draw(chunk, 8), draw(chunk, 5), draw(8, 5)
    g = -0.6065 * torch.sigmoid(draw(chunk, 8) if per_channel else draw(chunk))
    channels = g if per_channel else g.unsqueeze(-1).expand(chunk, 8)
    expected, last = token_by_token(a, b, k, v, channels, start)

    before = torch.cumsum(channels, 0) - channels
    # The reads of k v^T decay as those of b do.
    values = -from_dplr(a, k, g) @ v + (a * torch.exp(before)) @ start
    reads = solve(from_dplr(a, b, g)) @ values
    assert torch.allclose(reads, expected, rtol=0, atol=1e-12)

    total = before + channels
    kept = torch.exp(total[-1:] - total)
    state = torch.exp(total[-1]).unsqueeze(-1) * start + (b * kept).mT @ reads + (k * kept).mT @ v
    assert torch.allclose(state, last, rtol=0, atol=1e-12)


def test_low_rank_matrices_are_planned_like_others():
    generator = torch.Generator().manual_seed(0)
    removal = torch.nn.functional.normalize(torch.randn(8, 2, 64, 16, generator=generator), dim=-1)
    rates, w = torch.sigmoid(torch.randn(2, 8, 2, 64, 16, generator=generator))
    lower = from_dplr(-removal, removal * rates, -0.6065 * w)
    plan = qinvert.calibrate(lower[:4], method="block_merge", bits=8)
    assert qinvert.simulate(plan, lower[4:]).worst_sqnr_db > 30


def test_a_removal_key_without_decay_is_a_delta_rule():
    k = torch.nn.functional.normalize(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    beta = torch.full((16,), 0.7)
    expected = from_keys(k, torch.ones(16), torch.zeros(16)) * 0.7
    assert torch.allclose(from_dplr(-k, k * beta.unsqueeze(-1), torch.zeros(16, 8)), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 8, 3), (2, 7), (8,), (2, 8, 1)])
def test_a_decay_of_another_shape_is_refused(shape):
    k = torch.ones(2, 8, 4)
    with pytest.raises(InputError, match="one log decay per row"):
        from_keys(k, torch.ones(2, 8), torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_inputs_of_16_bits_are_summed_in_float32_and_rounded_once(dtype, per_channel, seed):
    generator = torch.Generator().manual_seed(seed)
    k = torch.nn.functional.normalize(torch.randn(4, 64, 16, generator=generator), dim=-1).to(dtype)
    beta = torch.rand(4, 64, generator=generator).to(dtype)
    g = (-0.3 * torch.rand(4, 64, *([16] if per_channel else []), generator=generator)).to(dtype)
    for function, inputs in ((from_keys, (k, beta, g)), (from_dplr, (-k, k * beta.unsqueeze(-1), g))):
        expected = function(*(x.double() for x in inputs))
        found = function(*inputs)
        assert found.dtype == dtype
        # Half a step of the type, and what float32 sums differ by.
        room = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-6
        assert bool(((found.double() - expected).abs() <= room).all())


def test_gates_of_16_bits_may_go_with_keys_of_32():
    k, beta, g = torch.ones(2, 64, 4), torch.ones(2, 64).half(), torch.full((2, 64), -0.1).bfloat16()
    assert torch.equal(from_keys(k, beta, g), from_keys(k, beta.float(), g.float()))
