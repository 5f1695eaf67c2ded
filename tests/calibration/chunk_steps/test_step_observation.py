"""What a pass of data leaves behind, whatever the order and the parts."""

import pytest
import torch
from chunk_layers import HEADS, KEYS, VALUES, C, observed, random_chunks, step_program

from qinvert.calibration.chunk_steps.observation import SAMPLE_CHUNKS, first_sequences, merged
from qinvert.calibration.chunk_steps.one_pass import split_heads
from qinvert.execution import chunk_steps
from qinvert.execution.value_channels import hadamard
from qinvert.matrices import SolvedInverse

programs = pytest.mark.parametrize(
    "options", [{}, {"decay": "channel"}, {"values_first": False, "halves": True}]
)


def same(first, second):
    assert first.largest.keys() == second.largest.keys()
    assert all(torch.equal(first.largest[name], second.largest[name]) for name in first.largest)
    assert (first.state_growth, first.tokens, first.longest) == (
        second.state_growth,
        second.tokens,
        second.longest,
    )


def passes(channel):
    return [random_chunks(seed, channel=channel, number=number) for seed, number in ((0, 4), (1, 2), (2, 5))]


@programs
def test_maxima_are_those_of_every_head_and_channel(options):
    program = step_program(**options)
    channel = options.get("decay") == "channel"
    chunks = random_chunks(3, channel=channel)
    found = observed(program, chunks)
    assert found.heads == HEADS
    assert torch.equal(found.largest["v"], chunks.v.abs().amax((0, 2, 3)))
    assert torch.equal(found.largest["k"], chunks.k.abs().amax((0, 2, 3, 4))[:, None])
    axes = (0, 2, 3, 4) if channel else (0, 2, 3)
    assert torch.equal(found.largest["g"], chunks.g.abs().amax(axes)[:, None])
    exact = chunks.apply(SolvedInverse(chunks.lower))
    assert torch.allclose(found.largest["o"], exact.out.abs().amax((0, 2, 3)), atol=1e-5)
    shapes = {tuple(x.shape) for x in found.largest.values()}
    assert shapes == {(HEADS, 1), (HEADS, VALUES)}
    assert {*found.largest} == {*program.tensors}
    assert found.tokens == 2 * 4 * C
    assert found.longest == 4 * C


@programs
def test_growth_is_the_largest_state_behind_every_chunk(options):
    program = step_program(**options)
    chunks = random_chunks(4, channel=options.get("decay") == "channel", number=5)
    found = observed(program, chunks)
    solved = SolvedInverse(chunks.lower)
    states = [*chunks.states(solved).unbind(2)[1:], chunks.apply(solved).state]
    expected = [float(state.abs().max()) for state in states]
    assert found.state_growth == pytest.approx(expected, rel=1e-5)


@programs
@pytest.mark.parametrize("most", [1, 24])
def test_parts_of_a_pass_change_nothing(options, most, monkeypatch):
    """More sequences and chunks than run at once: heads and growth stay apart."""
    program = step_program(**options)
    chunks = random_chunks(5, batch=5, channel=options.get("decay") == "channel")
    whole = observed(program, chunks)
    monkeypatch.setattr(chunk_steps, "CPU_MATRICES", most)
    parts = observed(program, chunks)
    assert len(parts.state_growth) == 4
    assert parts.state_growth == pytest.approx(whole.state_growth, rel=1e-6)
    for name, largest in whole.largest.items():
        assert torch.allclose(parts.largest[name], largest, rtol=1e-5), name


@programs
def test_processes_that_share_the_data_merge_to_one(options):
    program, given = step_program(**options), passes(options.get("decay") == "channel")
    whole = observed(program, *given)
    same(merged([observed(program, *given[:1]), observed(program, *given[1:])]), whole)
    # In any order, and with a process that saw nothing.
    same(merged([observed(program, *given[1:]), observed(program), observed(program, *given[:1])]), whole)
    assert whole.longest == 5 * C
    assert len(whole.state_growth) == 5


def test_the_sample_is_the_start_of_the_first_pass():
    first, second = random_chunks(0, number=SAMPLE_CHUNKS + 3), random_chunks(1)
    sample = observed(step_program(), first, second).sample
    assert torch.equal(sample.v, first.v[:, :, :SAMPLE_CHUNKS])
    assert sample.g.shape == (2, HEADS, SAMPLE_CHUNKS, C)
    assert torch.equal(sample.state, first.state)
    # A copy: the model may write over its activations.
    first.v.zero_()
    assert bool(sample.v.any())


def between_padding(chunks, before, after):
    """The same chunks with chunks of nothing around every sequence, as masked tokens give them."""

    def wider(x):
        blocks = [x.new_zeros(*x.shape[:2], count, *x.shape[3:]) for count in (before, after)]
        return torch.cat([blocks[0], x, blocks[1]], 2)

    return chunks.replaced(wider, chunks.state)


@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize(("before", "after"), [(SAMPLE_CHUNKS + 1, 0), (0, SAMPLE_CHUNKS), (3, 30), (1, 0)])
def test_padding_takes_no_place_in_the_sample(before, after, channel):
    chunks = random_chunks(8, channel=channel)
    sample = first_sequences(between_padding(chunks, before, after))
    for name in ("q", "k", "v", "g", "beta", "state"):
        assert torch.equal(getattr(sample, name), getattr(chunks, name)), name


def test_sequences_of_different_lengths_begin_with_their_own_first_token():
    chunks = random_chunks(9, batch=3, number=6)
    # One has all chunks, the second is padding alone, and the third begins with its fifth chunk.
    for x in (chunks.q, chunks.k, chunks.v):
        x[1], x[2, :, :4] = 0, 0
    state = torch.randn(chunks.state.shape, generator=torch.Generator().manual_seed(0))
    sample = first_sequences(chunks.replaced(lambda x: x, state))
    assert torch.equal(sample.v, chunks.v[[0, 2]])
    assert torch.equal(sample.state, state[[0, 2]])
    alone = first_sequences(chunks.replaced(lambda x: x[2:], state[2:]))
    assert torch.equal(alone.v, chunks.v[2:, :, 4:])
    # Its state has gone through four chunks that hold nothing.
    chunks = chunks.replaced(lambda x: x[2:], state[2:])
    assert torch.allclose(alone.state, chunks.states(SolvedInverse(chunks.lower))[:, :, 4], atol=1e-6)
    empty = chunks.replaced(torch.zeros_like, chunks.state)
    assert first_sequences(empty).v.shape == chunks.v.shape


def test_a_sample_holds_one_sequence_at_least(monkeypatch):
    monkeypatch.setattr("qinvert.calibration.chunk_steps.observation.SAMPLE_ELEMENTS", 1)
    assert first_sequences(random_chunks(0)).v.shape[0] == 1


def test_heads_are_split_with_their_sample():
    program, chunks = step_program(), random_chunks(6)
    whole = observed(program, chunks)
    for head, part in enumerate(split_heads(whole)):
        assert part.heads == 1
        assert torch.equal(part.largest["v"], whole.largest["v"][head : head + 1])
        assert torch.equal(part.sample.k, chunks.k[:, head : head + 1])
        assert part.sample.state.shape == (2, 1, KEYS, VALUES)


def test_rotated_values_are_observed_rotated():
    program, chunks = step_program(), random_chunks(7, outlier=20.0)
    plain, rotated = observed(program, chunks), observed(program, chunks, rotated=True)
    turned = (chunks.v @ hadamard(VALUES).to(torch.float32)).abs().amax((0, 2, 3))
    assert torch.allclose(rotated.largest["v"], turned, rtol=1e-5)
    assert float(rotated.largest["v"].max()) < float(plain.largest["v"].max())
    assert torch.equal(rotated.largest["k"], plain.largest["k"])


def test_a_value_that_is_not_a_number_counts_as_infinite():
    chunks = random_chunks()
    chunks.v[0, 1, 0, 0, 2] = torch.nan
    largest = observed(step_program(), chunks).largest["v"]
    assert largest[1, 2] == torch.inf
    assert torch.isfinite(largest[0]).all()
