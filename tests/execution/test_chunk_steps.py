"""Many chunks in a row: against single calls, against the delta rule, and what observers see."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_plans import small_plan, step_inputs

from qinvert.chunk_step.ports import OUTPUT, STATE, step_sizes
from qinvert.delta_rule.chunks import DeltaChunks
from qinvert.errors import InputError, PlanError
from qinvert.execution import chunk_steps
from qinvert.execution.chunk_steps import run_float, run_integers
from qinvert.execution.simulator import evaluate
from qinvert.execution.value_channels import enter, hadamard, leave
from qinvert.formats import INT8, INT8X2, INT16
from qinvert.matrices import SolvedInverse, solve
from qinvert.metrics import NoiseStatistics
from qinvert.numerics.rounding import dequantize, quantize
from qinvert.plan.quantization import Quantization
from qinvert.plan.value_channels import ValueChannels

PLANS = {
    "int8": small_plan().layer(),
    "planes": small_plan(wide=INT8X2).layer(),
    "wide": small_plan("npu-qdq-int16", wide=INT16, logs=INT16).layer(),
    "feedback": small_plan("npu-qdq-int16", wide=INT16, logs=INT16, error_feedback=True).layer(),
    "float": small_plan("npu-qdq-int8", float_state=True).layer(),
    "channel": small_plan(decay="channel").layer(),
    "state": small_plan(form="state", values_first=False).layer(),
    "wy": small_plan(form="wy").layer(),
    "halves": small_plan(form="state", halves=True, values_first=False).layer(),
}
plans = pytest.mark.parametrize("name", PLANS)
BATCH, HEADS, NUMBER = 2, 3, 4
EXPONENTS = ((3, 0, -2, *(0,) * 9), (0,) * 12, (1, -1) * 6)


def chunks_of(plan, seed=0, batch=BATCH, heads=HEADS, number=NUMBER) -> DeltaChunks:
    """Chunks of a layer, from inputs as the program's ports hold them."""
    sizes = step_sizes(plan.program)
    drawn = step_inputs(sizes, batch * heads, number, seed)
    turn = (lambda x: x.mT) if sizes.values_first else (lambda x: x)

    def cut(x):
        return x.reshape(batch, heads, number, sizes.chunk, *x.shape[2:])

    turn_keys = (lambda x: x.mT) if sizes.keys_first else (lambda x: x)
    g = turn_keys(drawn["g"]) if sizes.per_channel else drawn["g"][:, 0]
    return DeltaChunks(
        q=cut(turn_keys(drawn["q"])),
        k=cut(turn_keys(drawn["k"])),
        v=cut(turn(drawn["v"])),
        g=cut(g),
        beta=cut(turn(drawn["beta"])[..., 0]),
        state=turn(drawn["state"]).reshape(batch, heads, sizes.key_size, sizes.value_size),
    )


def one_by_one(plan, chunks):
    """Call the simulator for each chunk, and carry the integers of the state by hand."""
    sizes = step_sizes(plan.program)
    turn = (lambda x: x.mT) if sizes.values_first else (lambda x: x)
    grids = {p.name: plan.tensors[p.tensor] for p in plan.program.outputs}

    def real(name, integers):
        return dequantize(integers, grids[name].scale, grids[name].format)

    state, outs = turn(chunks.state.flatten(0, 1)), []
    for i in range(chunks.beta.shape[2]):
        g = chunks.g[:, :, i].flatten(0, 1)
        turn_keys = (lambda x: x.mT) if sizes.keys_first else (lambda x: x)
        ports = {
            "q": turn_keys(chunks.q[:, :, i].flatten(0, 1)),
            "k": turn_keys(chunks.k[:, :, i].flatten(0, 1)),
            "v": turn(chunks.v[:, :, i].flatten(0, 1)),
            "beta": turn(chunks.beta[:, :, i].flatten(0, 1)[..., None]),
            "g": turn_keys(g) if sizes.per_channel else g[:, None],
            "state": state,
        }
        found = evaluate(plan, ports)
        # Back to real values and again to integers, which keeps those of one plane.
        state = real(STATE, found[STATE])
        outs.append(turn(real(OUTPUT, found[OUTPUT])))
    front = chunks.beta.shape[:2]
    out = torch.stack(outs, 1)
    return out.reshape(*front, *out.shape[1:]), turn(state).reshape(*front, *chunks.state.shape[2:])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in PLANS if name != "planes"])
def test_many_chunks_are_as_many_calls_with_the_state_carried_by_hand(name, seed):
    plan = PLANS[name]
    chunks = chunks_of(plan, seed)
    result = run_integers(plan, chunks)
    out, state = one_by_one(plan, chunks)
    assert torch.equal(result.out, out)
    assert torch.equal(result.state, state)
    assert len(torch.unique(state)) > 20


def with_states(plan, chunks):
    """What a plan gives, and the integers of the state behind every chunk."""
    states = []
    result = run_integers(plan, chunks, observe=lambda n, x: states.append(x) if n == "state/new" else None)
    return result, states


def test_between_calls_a_state_of_two_planes_is_rounded_again():
    """A real value of ``(h, -128)`` is a tie of the high plane: every call may change such a number."""
    plan, kinds = PLANS["planes"], {True: 0, False: 0}
    grid = plan.tensors[STATE]
    for seed in range(12):
        chunks = chunks_of(plan, seed)
        result, states = with_states(plan, chunks)
        out, state = one_by_one(plan, chunks)
        carried = torch.cat(states[:-1])
        again = quantize(dequantize(carried, grid.scale, grid.format), grid.scale, grid.format)
        kept = torch.equal(again, carried)
        kinds[kept] += 1
        if kept:
            assert torch.equal(result.out, out)
            assert torch.equal(result.state, state)
        # One step of the state is less than one of what it is added to; in between it is rounded.
        assert float((result.state - state).abs().max()) < 1.5 * NUMBER * grid.scale
        assert float((again - carried).abs().max()) <= 1
    assert all(kinds.values())


def test_padding_moves_a_state_of_two_planes_by_one_step_once():
    plan, moved = PLANS["planes"], 0
    grid, kept = plan.tensors[STATE], plan.tensors["state/kept"]
    for seed in range(6):
        chunks = chunks_of(plan, seed)
        nothing = chunks.replaced(torch.zeros_like, chunks.state.clamp(-kept.limit, kept.limit))
        _, (first, *later) = with_states(plan, nothing)
        turn = nothing.state.mT if step_sizes(plan.program).values_first else nothing.state
        steps = (first[0] - quantize(turn.flatten(0, 1), grid.scale, grid.format)).abs()
        assert float(steps.max()) <= 1 + kept.scale / grid.scale
        assert all(torch.equal(state, first) for state in later)
        moved += int((steps > 0).sum())
    assert moved


@plans
def test_in_floating_point_it_is_the_delta_rule_with_the_exact_inverse(name):
    program = PLANS[name].program
    chunks = chunks_of(PLANS[name], 1)
    wide = DeltaChunks(
        **{n: getattr(chunks, n).to(torch.float64) for n in ("q", "k", "v", "g", "beta", "state")}
    )
    expected = wide.apply(solve(wide.lower))
    found = run_float(program, wide, torch.float64)
    assert torch.allclose(found.out, expected.out, rtol=0, atol=1e-11)
    assert torch.allclose(found.state, expected.state, rtol=0, atol=1e-11)
    single, exact = run_float(program, chunks), chunks.apply(SolvedInverse(chunks.lower))
    assert torch.allclose(single.out, exact.out, rtol=0, atol=1e-5)
    assert torch.allclose(single.state, exact.state, rtol=0, atol=1e-5)


def test_states_before_chunks_are_those_of_shorter_runs():
    plan = PLANS["int8"]
    chunks = chunks_of(plan)
    states = chunks.states(SolvedInverse(chunks.lower))
    assert torch.equal(states[:, :, 0], chunks.state)
    shorter = replace(chunks, **{n: getattr(chunks, n)[:, :, :2] for n in ("q", "k", "v", "g", "beta")})
    assert torch.allclose(
        states[:, :, 2], shorter.apply(SolvedInverse(shorter.lower)).state, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("most", [1, NUMBER * HEADS, 10**6])
@pytest.mark.parametrize("name", ["int8", "channel"])
def test_parts_hold_whole_sequences_and_change_no_bit(name, most, monkeypatch):
    plan, chunks = PLANS[name], chunks_of(PLANS[name])
    expected = run_integers(plan, chunks)
    monkeypatch.setattr(chunk_steps, "CPU_MATRICES", most)
    seen: dict[str, list[torch.Tensor]] = {}
    result = run_integers(plan, chunks, observe=lambda n, x: seen.setdefault(n, []).append(x))
    assert torch.equal(result.out, expected.out)
    assert torch.equal(result.state, expected.state)
    assert all(x.shape[1] % HEADS == 0 for values in seen.values() for x in values)
    parts = 1 if most == 10**6 else BATCH
    assert len(seen["k"]) == len(seen["state"]) == parts
    assert len(seen["state/new"]) == parts * NUMBER


@pytest.mark.parametrize("name", ["int8", "halves"])
def test_observers_see_every_tensor_of_every_chunk(name):
    plan, chunks = PLANS[name], chunks_of(PLANS[name])
    seen: dict[str, int] = {}
    run_integers(plan, chunks, observe=lambda n, x: seen.__setitem__(n, seen.get(n, 0) + x.numel()))
    assert set(seen) == set(plan.program.tensors)
    for tensor, shape in plan.program.shapes.items():
        count = BATCH * HEADS * (1 if tensor == STATE else NUMBER)
        assert seen[tensor] == count * shape.blocks * shape.rows * shape.columns, tensor
    states: list[torch.Tensor] = []
    result = run_integers(plan, chunks, observe=lambda n, x: states.append(x) if n == "state/new" else None)
    last = dequantize(states[-1][0], plan.tensors[STATE].scale, plan.tensors[STATE].format)
    last = last.mT if step_sizes(plan.program).values_first else last
    assert torch.equal(last.reshape(result.state.shape), result.state)


def test_a_state_with_two_grids_is_refused():
    plan = PLANS["int8"]
    grid = Quantization(format=plan.tensors[STATE].format, scale=2 * plan.tensors[STATE].scale)
    with pytest.raises(PlanError, match="one quantization"):
        run_integers(replace(plan, tensors={**plan.tensors, STATE: grid}), chunks_of(plan))


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), shift=st.integers(-20, 20), heads=st.sampled_from([1, HEADS]))
def test_powers_of_two_commute_with_the_rule_bit_for_bit(seed, shift, heads):
    plan = PLANS["wide"]
    chunks = chunks_of(plan, seed, batch=1, number=2)
    rows = EXPONENTS[:heads]
    channels = ValueChannels(exponents=tuple(tuple(e + shift for e in row) for row in rows))
    larger = replace(chunks, v=leave(channels, chunks.v), state=leave(channels, chunks.state))
    assert torch.equal(enter(channels, larger.v), chunks.v)
    expected, result = run_integers(plan, chunks), run_integers(plan, larger, channels)
    assert torch.equal(result.out, leave(channels, expected.out))
    assert torch.equal(result.state, leave(channels, expected.state))


def test_a_rotation_commutes_with_the_rule():
    plan = small_plan().layer()
    program = plan.program
    chunks = chunks_of(plan, 2)
    # Hadamard's matrix needs a power of two: of the 12 channels, 8.
    chunks = replace(chunks, v=chunks.v.to(torch.float64), state=chunks.state.to(torch.float64))
    turned = hadamard(8)
    assert torch.allclose(turned @ turned.mT, torch.eye(8, dtype=torch.float64), atol=1e-15)
    whole = torch.eye(12, dtype=torch.float64)
    whole[:8, :8] = turned
    found = run_float(program, replace(chunks, v=chunks.v @ whole, state=chunks.state @ whole), torch.float64)
    expected = run_float(program, chunks, torch.float64)
    assert torch.allclose(found.out @ whole.mT, expected.out, rtol=0, atol=1e-12)
    assert torch.allclose(found.state @ whole.mT, expected.state, rtol=0, atol=1e-12)


def test_entering_and_leaving_are_inverse_to_each_other():
    values = torch.randn(2, 3, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    for rows in (((2, -3) * 4,), tuple((i,) * 8 for i in range(3))):
        scaled, rotated = (ValueChannels(exponents=rows, rotated=r) for r in (False, True))
        assert torch.equal(leave(scaled, enter(scaled, values)), values)
        assert torch.allclose(leave(rotated, enter(rotated, values)), values, rtol=0, atol=1e-5)
        assert not torch.allclose(enter(rotated, values), values, atol=0.1)
    assert enter(None, values) is values is leave(None, values)
    # The axis of heads may be another one.
    heads_last = values.movedim(1, 3)
    assert torch.equal(enter(scaled, heads_last, axis=3), enter(scaled, values).movedim(1, 3))


@pytest.mark.parametrize("rows", [((0,) * 8,) * 2, ((0,) * 7,)])
def test_channels_of_another_layer_are_refused(rows):
    with pytest.raises(InputError, match="values have 3 heads and 8 channels, but the plan has"):
        enter(ValueChannels(exponents=rows), torch.ones(1, 3, 2, 4, 8))


def test_what_reading_loses_stays_in_the_state_that_is_carried():
    """``S_read`` is the carried state rounded to 8 bits; the decayed rest is part of the next state."""
    plan, seen = PLANS["feedback"], {}
    chunks = chunks_of(plan, number=6)
    run_integers(plan, chunks, observe=lambda name, x: seen.setdefault(name, []).append(x))
    carried, read = plan.tensors[STATE], plan.tensors["state/read"]
    assert (carried.format, read.format) == (INT16, INT8)
    states = [seen[STATE][0], *seen["state/new"][:-1]]
    lost = []
    for state, found in zip(states, seen["state/read"], strict=True):
        steps = state.flatten().to(torch.float64) * carried.scale / read.scale
        exact = [max(-128, min(127, round(x))) for x in steps.tolist()]
        assert exact == found.flatten().tolist()
        lost.append(float((steps - found.flatten()).abs().max()))
    # Half a step of 8 bits is lost in a read, but not from what is carried.
    assert 0.4 < max(lost) <= 0.5
    assert all(len(torch.unique(state)) > 256 for state in states[1:])


def test_error_feedback_keeps_a_state_that_8_bits_lose():
    """Where little is forgotten, what rounding to 8 bits loses adds up, unless it is fed back."""
    chunks = chunks_of(PLANS["feedback"], number=48)
    chunks = replace(chunks, g=chunks.g.clamp(min=-1e-3), beta=0.02 * chunks.beta)
    exact = chunks.apply(SolvedInverse(chunks.lower))

    def sqnr(plan):
        noise = NoiseStatistics()
        noise.update(run_integers(plan, chunks).state, exact.state)
        return noise.sqnr_db

    def carried(grid):
        return {**PLANS["feedback"].tensors, **dict.fromkeys(("state", "state/kept", "state/new"), grid)}

    wide, narrow = (PLANS["feedback"].tensors[name] for name in ("state", "state/read"))
    fed_back, rounded = (sqnr(replace(PLANS["feedback"], tensors=carried(grid))) for grid in (wide, narrow))
    assert fed_back > rounded + 3


def test_a_state_in_float32_is_decayed_and_added_to_in_ieee_arithmetic():
    """``S' = float32(float32(S float32(q_d s_d)) + float32(q_w s_w))``; products read S on a grid."""
    plan, seen = PLANS["float"], {}
    run_integers(plan, chunks_of(plan), observe=lambda name, x: seen.setdefault(name, []).append(x.numpy()))
    early = seen["decay_kept"][0]
    states = [seen[STATE][0], *seen["state/new"]]
    for i, (before, after) in enumerate(pairwise(states)):
        decay, written, read = early[i], seen["state/written"][i][0], seen["state/read"][i][0]
        scale = {name: np.float32(plan.tensors[name].scale) for name in plan.tensors}
        kept = before[0] * (decay * scale["decay_kept"])
        assert np.array_equal(after[0], kept + written * scale["state/written"])
        steps = np.rint(before[0] / scale["state/read"]).clip(-128, 127)
        assert np.array_equal(read, steps)
    assert len(np.unique(states[-1])) > 256


def test_chunks_that_are_all_padding_keep_every_bit_of_a_state_in_float32():
    plan = PLANS["float"]
    chunks = chunks_of(plan)
    silent = replace(chunks, **{n: torch.zeros_like(getattr(chunks, n)) for n in ("k", "v", "g", "beta")})
    grid = plan.tensors["decay_kept"]
    assert torch.exp(torch.zeros(1)).item() == pytest.approx(grid.limit)
    kept = run_integers(plan, silent).state
    factor = torch.tensor(grid.format.largest * grid.scale, dtype=torch.float32)
    expected = chunks.state
    for _ in range(chunks.beta.shape[2]):
        expected = expected * factor
    assert torch.equal(kept, expected)
