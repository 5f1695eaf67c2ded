from __future__ import annotations

import pytest
import torch

from qinvert.errors import InputError
from qinvert.matrices import check_matrices
from qinvert.stress import KEY_SIZE, MAX_BETA, STRESS, stress_matrices, unit_keys

every_set = pytest.mark.parametrize("name", STRESS)


@every_set
@pytest.mark.parametrize(("count", "chunk"), [(1, 2), (3, 4), (2, 16), (5, 64), (1, 128)])
def test_every_set_gives_legal_float32_matrices(name, count, chunk):
    lower = stress_matrices(name, count, chunk)
    assert lower.dtype == torch.float32
    assert lower.shape == (count, chunk, chunk)
    assert torch.equal(check_matrices(lower, chunk), lower)


@every_set
def test_the_same_seed_gives_the_same_matrices(name):
    assert torch.equal(stress_matrices(name, 3, 16, seed=5), stress_matrices(name, 3, 16, seed=5))


@pytest.mark.parametrize("name", sorted(set(STRESS) - {"ones", "repeated_keys", "filled_blocks"}))
def test_another_seed_gives_other_matrices(name):
    assert not torch.allclose(stress_matrices(name, 3, 16, seed=5), stress_matrices(name, 3, 16, seed=6))


@every_set
def test_the_global_generator_is_left_alone(name):
    state = torch.random.get_rng_state()
    stress_matrices(name, 2, 8)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["", "nothing", "ONES", None])
def test_an_unknown_set_lists_the_legal_ones(name):
    with pytest.raises(InputError, match=f"unknown stress set {name!r}; use one of half_random, .*, outlier"):
        stress_matrices(name)


@pytest.mark.parametrize("name", MAX_BETA)
def test_sets_from_unit_keys_keep_both_bounds(name, solved):
    lower = stress_matrices(name, 8, 64, seed=3)
    assert lower.abs().max() <= MAX_BETA[name] + 1e-6
    assert torch.tril(solved(lower), -1).abs().max() <= MAX_BETA[name] + 1e-5


def test_filled_blocks_break_the_bound_that_unit_keys_would_give(solved):
    lower = stress_matrices("filled_blocks", 2, 64)
    assert lower.max() > 1
    assert torch.tril(solved(lower), -1).abs().max() > 1


def test_channels_of_per_channel_decay_forget_at_different_rates():
    lower = stress_matrices("per_channel_decay", 64, 64, seed=1)
    # Slow channels keep a part of the first key for the whole chunk; fast ones make the rest smaller.
    share = lower[:, -8:, 0].abs().mean() / lower[:, 1:9, 0].abs().mean()
    assert 0.2 < float(share) < 0.9


@pytest.mark.parametrize("cosine", [0.0, 0.3, 0.97, 1.0])
def test_unit_keys_have_unit_norm_and_the_asked_cosine(cosine):
    keys = unit_keys(200, 16, cosine, torch.Generator().manual_seed(0))
    assert keys.shape == (200, 16, KEY_SIZE)
    assert torch.allclose(keys.norm(dim=-1), torch.ones(200, 16), atol=1e-6)
    cosines = keys @ keys.mT
    rows, columns = torch.tril_indices(16, 16, -1)
    assert float(cosines[:, rows, columns].mean()) == pytest.approx(cosine, abs=0.03)


def test_ones_are_ones():
    lower = stress_matrices("ones", 2, 16)
    assert torch.allclose(lower, torch.tril(torch.ones(16, 16), -1).expand(2, -1, -1), atol=1e-6)


@pytest.mark.parametrize(("name", "factor"), [("half_random", 0.5), ("small_random", 0.1)])
def test_random_entries_are_uniform_up_to_their_factor(name, factor):
    lower = stress_matrices(name, 50, 32)
    entries = lower[torch.tril(torch.ones(50, 32, 32), -1).bool()]
    assert entries.min() >= 0
    assert 0.99 * factor < entries.max() <= factor
    assert float(entries.mean()) == pytest.approx(factor / 2, rel=0.02)


def test_rows_of_beta_are_constant():
    lower = stress_matrices("beta_ones", 3, 16)
    for i in range(1, 16):
        assert torch.equal(lower[:, i, :i], lower[:, i, :1].expand(-1, i))
    assert lower[:, 1:, 0].unique().numel() == 3 * 15


def test_filled_blocks_are_blocks_of_sixteen():
    lower = stress_matrices("filled_blocks", 2, 64)
    assert lower.unique().tolist() == pytest.approx([0.0, 1.45])
    assert int(lower[0].count_nonzero()) == 4 * (16 * 15 // 2)
    assert not lower[:, 16:, :16].any()


def test_repeated_keys_decay_from_their_beta():
    lower = stress_matrices("repeated_keys", 2, 64)
    gap = torch.arange(64.0).unsqueeze(1) - torch.arange(64.0)
    expected = torch.tril(0.835 * torch.exp(-1e-3 * gap), -1)
    assert torch.allclose(lower, expected.expand(2, -1, -1), atol=1e-5)


def test_negative_eigenvalues_need_beta_above_one():
    lower = stress_matrices("negative_eigenvalues", 16, 64)
    assert 1.0 < lower.abs().max() <= 2.0


def test_wide_gates_go_from_no_decay_to_complete_decay():
    first_column = stress_matrices("wide_gates", 64, 64)[:, 8:, 0].abs().amax(1)
    assert first_column.min() == 0
    assert first_column.max() > 0.5


def test_zero_rows_end_in_padding():
    lower = stress_matrices("zero_rows", 2, 16)
    assert not lower[:, 9:].any()
    assert lower[:, 8].any(dim=-1).all()


def test_an_outlier_is_far_above_the_rest():
    lower = stress_matrices("outlier", 4, 16)
    assert float(lower[0, 8, 4]) == 1.0
    lower[0, 8, 4] = 0
    assert lower.abs().max() <= 0.05
