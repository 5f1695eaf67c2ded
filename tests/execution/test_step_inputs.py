"""`LayerPlan.step`: any length, in pieces, with padding; what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from step_plans import small_plan, step_plan

import qinvert
from qinvert import elimination, gated_delta_step
from qinvert.errors import InputError, PlanError, ProgramError
from qinvert.formats import INT16
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization
from qinvert.plan.value_channels import ValueChannels

#: Sizes of `small_plan`: tokens of a chunk, of a key, of a value.
C, KEYS, VALUES = 16, 8, 12
BATCH, HEADS = 2, 3
ORDER = ("q", "k", "v", "g", "beta", "state")


def tokens(count, seed=0, *, channel=False, values=VALUES, keys=KEYS):
    """Inputs of `LayerPlan.step` by name."""
    rng = np.random.default_rng(seed)
    front = (BATCH, HEADS, count)
    q, k = (rng.normal(size=(*front, keys)).astype("f4") for _ in range(2))
    found = {
        "q": q / np.linalg.norm(q, axis=-1, keepdims=True) * keys**-0.5,
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.normal(size=(*front, values)),
        "g": -0.1 * rng.random((*front, keys) if channel else front),
        "beta": rng.random(front),
        "state": 0.3 * rng.normal(size=(BATCH, HEADS, keys, values)),
    }
    return {name: torch.from_numpy(x).to(torch.float32) for name, x in found.items()}


def cut(given, start, stop, state):
    return {n: x[:, :, start:stop] for n, x in given.items() if n != "state"} | {"state": state}


PLANS = {
    "int8": small_plan().layer(),
    "wide": small_plan("npu-qdq-int16", wide=INT16, logs=INT16).layer(),
    "channel": small_plan(decay="channel", form="state", values_first=False).layer(),
    "wy": small_plan(form="wy", values_first=False).layer(),
    "halves": small_plan(halves=True).layer(),
}
plans = pytest.mark.parametrize("name", PLANS)


@plans
def test_pieces_of_whole_chunks_give_the_same_bits_as_one_call(name):
    plan, given = PLANS[name], tokens(3 * C, channel=name == "channel")
    o, state = plan.step(**given)
    first, between = plan.step(**cut(given, 0, C, given["state"]))
    second, last = plan.step(**cut(given, C, 3 * C, between))
    assert torch.equal(torch.cat([first, second], 2), o)
    assert torch.equal(last, state)
    assert len(torch.unique(o)) > 50


@pytest.mark.parametrize("count", [1, C - 1, C + 1, 3 * C + 2])
@plans
def test_any_length_is_what_padding_by_valid_gives(name, count):
    plan, given = PLANS[name], tokens(count, 1, channel=name == "channel")
    o, state = plan.step(**given)
    assert o.shape == (BATCH, HEADS, count, VALUES)
    # Whatever stands in the padding of the last chunk, as long as it is legal.
    more = -count % C
    extra = tokens(more, 2, channel=name == "channel")
    longer = {n: torch.cat([x, extra[n]], 2) for n, x in given.items() if n != "state"}
    valid = torch.cat([torch.ones(BATCH, count), torch.zeros(BATCH, more)], 1)
    padded, same = plan.step(**longer, state=given["state"], valid=valid)
    assert torch.equal(padded[:, :, :count], o)
    assert torch.equal(same, state)
    # Without the mask the extra tokens do change the state.
    assert not torch.equal(plan.step(**longer, state=given["state"])[1], state)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_chunks_of_64_tokens_take_any_length_too(count):
    plan = step_plan(gated_delta_step(elimination(64), KEYS, VALUES))
    given = tokens(count, 3)
    o, state = plan.step(**given)
    whole = {
        n: torch.nn.functional.pad(x, (0, 0) * (x.ndim - 3) + (0, -count % 64)) for n, x in given.items()
    }
    padded, same = plan.step(**{**whole, "state": given["state"]})
    assert torch.equal(padded[:, :, :count], o)
    assert torch.equal(same, state)
    exact, _ = delta_rule(given)
    # Eight bits everywhere: a few per cent.
    assert (o - exact).norm() < 0.2 * exact.norm()


def delta_rule(given):
    """Token by token, in float64: the recurrence that everything else is a form of."""
    q, k, v, g, beta, state = (given[name].to(torch.float64) for name in ORDER)
    outs = []
    for t in range(q.shape[2]):
        state = state * torch.exp(g[:, :, t, None, None])
        error = v[:, :, t] - (k[:, :, t, None] @ state)[:, :, 0]
        state = state + (beta[:, :, t, None] * k[:, :, t])[..., None] * error[:, :, None]
        outs.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(outs, 2), state


def test_it_is_the_recurrence_within_its_grids():
    given = tokens(4 * C, 5)
    o, state = PLANS["wide"].step(**given)
    exact, last = delta_rule(given)
    assert (o - exact).norm() < 0.05 * exact.norm()
    assert (state - last).norm() < 0.05 * last.norm()


def test_no_state_is_a_state_of_zeros():
    given = tokens(C)
    zeros = {**given, "state": torch.zeros_like(given["state"])}
    del given["state"]
    for found, expected in zip(PLANS["int8"].step(**given), PLANS["int8"].step(**zeros), strict=True):
        assert torch.equal(found, expected)


def test_normalize_takes_the_tensors_of_the_layer():
    given = tokens(C, 7)
    raw = {**given, "q": 3 * KEYS**0.5 * given["q"], "k": 5 * given["k"]}
    o, state = PLANS["wide"].step(**raw, normalize=True)
    expected, last = PLANS["wide"].step(**given)
    # The norm adds 1e-6 under the root, which may move a value over the middle between two integers.
    step = PLANS["wide"].tensors["state/new"].scale
    assert (o - expected).norm() < 1e-2 * expected.norm()
    assert (state - last).abs().max() < 300 * step


def test_arrays_give_arrays_and_half_precision_is_taken_as_it_is():
    given = tokens(C)
    o, state = PLANS["int8"].step(**{n: x.numpy() for n, x in given.items()})
    assert isinstance(o, np.ndarray)
    expected, last = PLANS["int8"].step(**given)
    assert np.array_equal(o, expected.numpy())
    assert np.array_equal(state, last.numpy())
    half = {n: x.to(torch.float16) for n, x in given.items()}
    o, _ = PLANS["int8"].step(**half)
    assert o.dtype == torch.float32
    assert torch.equal(o, PLANS["int8"].step(**{n: x.to(torch.float32) for n, x in half.items()})[0])


def test_autocast_changes_nothing():
    given = tokens(C)
    expected = PLANS["int8"].step(**given)
    with torch.autocast("cpu", torch.bfloat16):
        found = PLANS["int8"].step(**given)
    assert all(map(torch.equal, found, expected))


def test_it_has_no_gradient_and_says_so():
    given = tokens(C)
    given["v"].requires_grad_()
    o, _ = PLANS["int8"].step(**given)
    with pytest.raises(InputError, match="has no gradient"):
        o.sum().backward()


def test_value_channels_are_applied_at_both_ends():
    plan, given = PLANS["int8"], tokens(2 * C, 9)
    exponents = tuple(tuple((i + h) % 3 for i in range(VALUES)) for h in range(HEADS))
    scaled = replace(plan, channels=ValueChannels(exponents=exponents))
    factors = torch.exp2(torch.tensor(exponents, dtype=torch.float32))[:, None]
    larger = {**given, "v": given["v"] * factors, "state": given["state"] * factors}
    o, state = scaled.step(**larger)
    expected, last = plan.step(**given)
    assert torch.equal(o, expected * factors)
    assert torch.equal(state, last * factors)


def changed(name, value):
    return {**tokens(C), name: value}


def ones(*shape):
    return torch.ones(BATCH, *shape)


EMPTY = {name: x if name == "state" else x[:, :, :0] for name, x in tokens(C).items()}
FLAT = {name: x[0] for name, x in tokens(C).items()}
CASES = {
    "fewer heads of keys": (
        changed("k", ones(HEADS - 1, C, KEYS)),
        r"k \[2, 2, 16, 8\].*do not fit; pass",
    ),
    "fewer heads of values": (changed("v", ones(1, C, VALUES)), r"v \[2, 1, 16, 12\].*do not fit"),
    "another value size": (changed("v", ones(HEADS, C, 5)), r"v \[B, H, T, 12\]"),
    "another key size": (changed("q", ones(HEADS, C, 9)), r"q, k \[B, H, T, 8\]"),
    "a decay per channel": (changed("g", -ones(HEADS, C, KEYS)), r"g \[B, H, T\] and beta"),
    "no token": (EMPTY, "with T > 0"),
    "no batch axis": (FLAT, "do not fit"),
    "a transposed state": (
        changed("state", ones(HEADS, VALUES, KEYS)),
        r"state has shape .* pass \[2, 3, 8, 12\]",
    ),
    "growth": (changed("g", ones(HEADS, C)), "g reaches 1; pass log decays, which are at most 0"),
    "a large beta": (
        changed("beta", 1.5 * ones(HEADS, C)),
        r"beta goes from 1.5 to 1.5; .* made for \[0, 1\]",
    ),
    "a negative beta": (changed("beta", -ones(HEADS, C)), r"beta goes from -1 to -1"),
    "NaN": (changed("v", torch.nan * ones(HEADS, C, VALUES)), "v holds NaN or Inf values"),
    "an infinite state": (
        changed("state", torch.inf * ones(HEADS, KEYS, VALUES)),
        "state holds NaN or Inf",
    ),
    "a mask of another length": (
        tokens(C) | {"valid": ones(C + 1)},
        r"valid has shape \[2, 17\]; pass 0 and 1, \[2, 16\]",
    ),
    "a mask of halves": (tokens(C) | {"valid": 0.5 * ones(C)}, "pass 0 and 1"),
    "text": (changed("q", "text"), "q"),
}


@pytest.mark.parametrize("case", CASES)
def test_inputs_that_do_not_fit_are_refused_in_one_line(case):
    given, words = CASES[case]
    with pytest.raises(InputError, match=words) as error:
        PLANS["int8"].step(**given)
    assert "\n" not in str(error.value)


def test_an_unknown_rounding_is_refused():
    with pytest.raises(PlanError, match="rounding 'up' is unknown; use onnx, hexagon or tflite"):
        PLANS["int8"].step(**tokens(C), rounding="up")


def test_a_state_with_two_grids_is_refused():
    plan = PLANS["int8"]
    grid = plan.tensors["state"]
    spoiled = LayerPlan(
        program=plan.program,
        tensors={**plan.tensors, "state": Quantization(format=grid.format, scale=2 * grid.scale)},
        requantize=plan.requantize,
    )
    with pytest.raises(PlanError, match="one quantization") as error:
        spoiled.step(**tokens(C))
    assert "\n" not in str(error.value)


def test_a_plan_of_inverses_has_no_step_and_a_plan_of_steps_no_inverse():
    lower = torch.tril(torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(0)) / 8, -1)
    inverse = qinvert.calibrate(lower).layer()
    with pytest.raises(ProgramError, match=r"not a whole chunk step.*scope='chunk'") as error:
        inverse.step(**tokens(C))
    assert "\n" not in str(error.value)
    with pytest.raises(ProgramError, match=r"computes no inverse|not an inverse") as error:
        PLANS["int8"].inverse(lower)
    assert "\n" not in str(error.value)
