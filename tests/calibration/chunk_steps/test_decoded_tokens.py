"""Ranges of decoding: a recurrence in float64, token by token, is the oracle."""

from dataclasses import replace

import pytest
import torch
from chunk_layers import HEADS, KEYS, VALUES, C, layer_of, observed, random_chunks, step_program

from qinvert.calibration.choices import RangeRule
from qinvert.calibration.chunk_steps import decoded_tokens
from qinvert.calibration.chunk_steps.candidate import plan_layer
from qinvert.calibration.chunk_steps.decoded_tokens import observe_decoding
from qinvert.chunk_step.single_token import single_token_plan
from qinvert.metrics import NoiseStatistics

programs = pytest.mark.parametrize(
    "options", [{}, {"decay": "channel"}, {"values_first": False, "halves": True}, {"form": "wy"}]
)


def recurrence(chunks, form="folded"):
    """Yield what the state predicts, ``(exp(g) k)^T S``, times beta in the WY form, the output and the
    state of every token: arXiv 2412.06464, equation 10.
    """
    q, k, v, g, beta = (
        getattr(chunks, n).flatten(2, 3).to(torch.float64) for n in ("q", "k", "v", "g", "beta")
    )
    state = chunks.state.to(torch.float64)
    for i in range(beta.shape[-1]):
        decay = g[:, :, i].reshape(*state.shape[:2], -1, 1).exp()
        state = decay * state
        predicted = torch.einsum("bhk,bhkv->bhv", k[:, :, i], state)
        written = beta[:, :, i, None] * (v[:, :, i] - predicted)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, :, i], written)
        factor = beta[:, :, i, None] if form == "wy" else 1.0
        yield factor * predicted, torch.einsum("bhk,bhkv->bhv", q[:, :, i], state), state


def largest(tensors):
    return torch.stack(
        [x.abs().amax(tuple(a for a in range(x.ndim) if a not in (1, x.ndim - 1))) for x in tensors]
    ).amax(0)


def returning(chunks):
    """The same with one key and value for all tokens of a head, and no decay: what is predicted grows."""
    k = chunks.k[:, :, :1, :1].expand_as(chunks.k).contiguous()
    v = chunks.v[:, :, :1, :1].expand_as(chunks.v).contiguous()
    return replace(chunks, k=k, v=v, g=torch.zeros_like(chunks.g))


def sqnr_db(estimate, exact):
    statistics = NoiseStatistics()
    statistics.update(estimate, exact)
    return statistics.sqnr_db


@programs
def test_maxima_are_those_of_the_recurrence(options):
    channel = options.get("decay") == "channel"
    chunks = random_chunks(1, channel=channel)
    found = {}

    def observe(name, values):
        found.setdefault(name, []).append(values)

    program = step_program(**options)
    observe_decoding(program, chunks, observe)
    assert {*found} < {*program.tensors}
    predicted, out, states = (largest(x) for x in zip(*recurrence(chunks, options.get("form")), strict=True))
    for name, wanted in (("v_predicted", predicted), ("o", out), ("state/new", states)):
        # Blocks, sequences, and what is not a value channel.
        axes = (0, 1, 4 if options.get("values_first", True) else 3)
        seen = [x.unflatten(1, (-1, HEADS)).abs().amax(axes) for x in found[name]]
        assert torch.allclose(torch.stack(seen).amax(0).to(torch.float64), wanted, atol=1e-5), name


@programs
def test_plans_hold_what_decoding_reaches(options):
    chunks = returning(random_chunks(2, channel=options.get("decay") == "channel", number=1))
    layer = layer_of(step_program(**options), chunks)
    # The state before the only chunk is zero, and so is all that prefill predicts.
    predicted, _, states = (
        float(largest(x).max()) for x in zip(*recurrence(chunks, options.get("form")), strict=True)
    )
    assert predicted > 1
    for rule in (RangeRule.MAX, RangeRule.MSE):
        plan = plan_layer(layer, (), None, rule)
        assert plan.tensors["state"].limit >= 0.99 * states
        assert plan.tensors["v_predicted"].limit >= (0.99 if rule is RangeRule.MAX else 0.4) * predicted


def test_decoded_tokens_stay_close_to_the_recurrence():
    chunks = returning(random_chunks(3, number=1))
    layer = layer_of(step_program(), chunks)
    groups = tuple(layer.widths.value_groups)
    plan = plan_layer(layer, groups, None, RangeRule.MAX)

    def decoded(plan):
        single, state, outs = single_token_plan(plan), chunks.state, []
        for i in range(C):
            given = [getattr(chunks, name)[:, :, 0, i : i + 1] for name in ("q", "k", "v", "g", "beta")]
            out, state = single.step(*given, state)
            outs.append(out[:, :, 0])
        return torch.stack(outs)

    exact = torch.stack([out for _, out, _ in recurrence(chunks)])
    assert sqnr_db(decoded(plan), exact) > 30
    # Ranges of prefill alone.
    grid = plan.tensors["v_predicted"]
    narrow = replace(plan, tensors={**plan.tensors, "v_predicted": replace(grid, scale=grid.scale / 16)})
    assert sqnr_db(decoded(narrow), exact) < 10


def test_a_pass_decodes_from_no_more_states_than_it_may(monkeypatch):
    chunks, counts = random_chunks(4, batch=3, number=5), []
    program = step_program()

    def observe(name, values):
        if name == "state/new":
            counts.append(values.shape[1] // HEADS)

    for most, wanted in ((1, 1), (4 * HEADS * KEYS * VALUES, 4), (2**21, 15)):
        monkeypatch.setattr(decoded_tokens, "STATE_ELEMENTS", most)
        counts.clear()
        observe_decoding(program, chunks, observe)
        assert counts == [wanted] * C


def test_programs_of_other_names_decode_by_themselves():
    chunks, program = random_chunks(5), step_program()
    mine = replace(program, name="mine")
    assert observed(mine, chunks).largest.keys() == observed(program, chunks).largest.keys()
    for name, values in observed(mine, chunks).largest.items():
        assert torch.allclose(values, observed(program, chunks).largest[name], atol=1e-5), name
