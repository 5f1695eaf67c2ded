"""The choice among blocks by sums and products, against its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinvert.export.deployment.blocks import GROUP, BlockSizes, best, block_keys, ones_before, visible_entries
from qinvert.export.deployment.cache import WindowCache
from qinvert.export.deployment.states import Traffic

SIZES = BlockSizes(tokens=4, chosen=2, positions=32)
#: Entries of a cache.
CACHE = 24


def called(states, width, valid, first):
    """A cache in a call whose window has so many places, of which so many count."""
    positions = torch.arange(width, dtype=torch.int32)[None] + first
    counted = (torch.arange(width) < valid).float()[None]
    return WindowCache(
        Traffic(cache=CACHE, given=states), counted, torch.tensor([first], dtype=torch.int32), positions
    )


def windows(data):
    """Places of a window, and how many of them count: a few windows whose tokens fit."""
    found, left = [], SIZES.positions - 8
    while left and len(found) < 5:
        width = data.draw(st.integers(1, 8))
        found.append((width, data.draw(st.integers(1, min(width, left)))))
        left -= found[-1][1]
    return found


@given(st.data())
def test_blocks_are_full_when_their_last_token_has_come(data):
    tokens = torch.randn(1, 40, 3, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    states, first = None, 0
    for width, valid in windows(data):
        cache = called(states, width, valid, first)
        # Padding is not zero, and must not count.
        inputs = torch.cat([tokens[:, first : first + valid], torch.full((1, width - valid, 3), 9.0)], 1)
        keys = block_keys(cache, 0, inputs, SIZES, lambda groups: groups.mean(2))
        states, first = cache.traffic.returned, first + valid
        whole = first // SIZES.tokens
        wanted = tokens[:, : whole * SIZES.tokens].reshape(1, whole, SIZES.tokens, 3).mean(2)
        assert torch.equal(keys[:, :whole], wanted)
        assert not keys[:, whole:].any()
        rest = first - whole * SIZES.tokens
        assert torch.equal(states["tail_0"][:, :rest], tokens[:, first - rest : first])
        assert not states["tail_0"][:, rest:].any()


@given(st.data(), st.integers(1, 70), st.integers(0, 2 * GROUP))
def test_the_best_are_the_highest_and_of_equal_ones_the_first(data, count, seen):
    values = data.draw(st.lists(st.integers(-2, 2), min_size=2 * GROUP, max_size=2 * GROUP))
    scores = torch.tensor(values).float()
    # What TopK takes of equal values is not to matter, nor are scores of what is not seen.
    found = best(scores[None, None], (torch.arange(2 * GROUP) < seen).float()[None, None], count)[0, 0]
    wanted = sorted(range(seen), key=lambda n: (-values[n], n))[:count]
    assert set(found.tolist()) <= {0.0, 1.0}
    assert found.sum() == count
    assert found[:seen].nonzero().flatten().tolist() == sorted(wanted)


@pytest.mark.parametrize("groups", [1, 3])
def test_ones_are_counted_before_each_place(groups):
    x = torch.randint(0, 2, (1, 5, groups * GROUP), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(ones_before(x), x.cumsum(2) - x)


def test_a_query_sees_its_best_blocks_and_what_is_behind_the_full_ones():
    # The last entries hold positions 0 to 2 and one of padding; the window has positions 3 to 12.
    cache = called({"entries_4": torch.zeros(CACHE, dtype=torch.int32)}, 10, 10, 3)
    scores = torch.zeros(1, 10, SIZES.blocks)
    scores[..., 1] = 1.0
    seen = visible_entries(cache, scores, BlockSizes(tokens=4, chosen=1, positions=32))[0, 0]
    places = [CACHE - 4, CACHE - 3, CACHE - 2, *range(CACHE, CACHE + 10)]
    # Position 3 sees one block whole, the first; position 12 sees three, and takes the second.
    assert seen[0].all()
    assert seen[9, places].nonzero().flatten().tolist() == [4, 5, 6, 7, 12]
    assert cache.traffic.returned["entries_4"].tolist() == [0] * 15 + [1] * 4 + [2] * 4 + [3]


def test_budgets_that_cover_all_positions_take_all():
    assert BlockSizes(tokens=4, chosen=8, positions=35).takes_all
    assert not BlockSizes(tokens=4, chosen=7, positions=32).takes_all
    assert BlockSizes(tokens=4, chosen=1, positions=4 * GROUP + 1).blocks == 2 * GROUP
