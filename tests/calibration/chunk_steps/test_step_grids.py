"""From what was seen to grids: proved ranges, room, margins, and the two ends of the state."""

from dataclasses import replace

import pytest
import torch
from chunk_layers import HEADS, RULES, VALUES, layer_of, observed, random_chunks, small_layer, step_program

from qinvert.calibration.choices import RangeRule, ScaleRule
from qinvert.calibration.chunk_steps.candidate import plan_layer
from qinvert.calibration.chunk_steps.grids import (
    STATE_ROOM,
    WIDE_ROOM,
    RoomRules,
    proved_ranges,
    seen_ranges,
    value_exponents,
)
from qinvert.calibration.chunk_steps.widths import width_groups
from qinvert.chunk_step.form import Decay, Form
from qinvert.execution.chunk_steps import run_float, run_integers
from qinvert.formats import INT4, INT8, INT8X2, INT16
from qinvert.plan.value_channels import MAX_EXPONENT, ValueChannels

#: Slices and copies of beta, which are as large as beta itself.
BETAS = {"beta/turned", "beta/upper", "beta/lower"}
PLANNED = [
    (decay, form, widened)
    for decay in Decay
    for form in Form
    for widened in ((), ("state",), ("v", "v_new", "o", "state"))
]
planned = pytest.mark.parametrize(("decay", "form", "widened"), PLANNED)


def made(decay, form, widened, **options):
    layer = small_layer(decay, form, **options)
    return layer, plan_layer(
        layer, tuple(g for g in widened if g in layer.widths.groups), None, RangeRule.MAX
    )


@planned
def test_both_ends_of_the_state_and_what_is_kept_of_it_have_one_grid(decay, form, widened):
    _, plan = made(decay, form, widened)
    assert plan.tensors["state"] == plan.tensors["state/new"] == plan.tensors["state/kept"]


@planned
def test_padding_by_whole_chunks_changes_no_bit(decay, form, widened):
    _, plan = made(decay, form, widened)
    chunks = random_chunks(7, channel=decay == "channel")
    given = {"q": chunks.q, "k": chunks.k, "v": chunks.v, "g": chunks.g, "beta": chunks.beta}
    flat = {name: x.flatten(2, 3) for name, x in given.items()}
    valid = torch.ones(flat["beta"].shape[::2])
    valid[:, 25:] = 0
    o, state = plan.step(**flat, valid=valid)
    short, same = plan.step(**{name: x[:, :, :25] for name, x in flat.items()})
    assert torch.equal(o[:, :, :25], short)
    assert torch.equal(state, same)
    assert bool((state != 0).any())


@planned
def test_no_value_of_the_data_saturates_with_the_largest_as_range(decay, form, widened):
    layer, plan = made(decay, form, widened)
    largest = {}

    def observe(name, values):
        largest[name] = max(largest.get(name, 0.0), float(values.abs().max()))

    run_float(layer.program, layer.sample, observe=observe)
    logs = {*layer.widths.groups["g"]}
    for name, seen in largest.items():
        grid = plan.tensors[name]
        # Half a step beyond the end still rounds onto it; grids of log decays end where exp is 0.
        assert seen <= grid.limit + grid.scale / 2 or name in logs, name
    assert plan.tensors["g"].limit >= largest["g"]


@planned
def test_proved_ranges_are_never_exceeded_and_taken_where_they_cost_little(decay, form, widened):
    layer, plan = made(decay, form, widened)
    proved = proved_ranges(layer.program, 1.0)
    seen = seen_ranges(layer.program, layer.observed, None)
    assert len(proved) > 20
    taken = 0
    for name, bound in proved.items():
        if name in layer.widths.groups["g"]:
            continue
        assert plan.ranges[name] <= bound, name
        if bound <= 1.25 * seen[name]:
            assert plan.ranges[name] == bound, name
            taken += 1
    assert taken > 5


def test_ranges_of_the_key_path_hold_for_other_data():
    """What is proved for unit keys needs no data: strong gates and equal keys stay inside."""
    layer, plan = made("scalar", "folded", ())
    proved = proved_ranges(layer.program, 1.0)
    chunks = random_chunks(11, decay=0.0, top=1.0)
    alike = replace(chunks, k=chunks.k[:, :, :, :1].expand_as(chunks.k), beta=torch.ones_like(chunks.beta))
    found = observed(layer.program, alike)
    largest = {name: float(x.max()) for name, x in found.largest.items()}
    assert all(largest[name] <= bound * (1 + 1e-5) for name, bound in proved.items())
    # And some of them are reached, which the data of the plan did not show.
    assert largest["gram"] > 0.999
    assert plan.ranges["gram"] <= 1


@pytest.mark.parametrize(
    ("margin", "widened", "factor"),
    [
        (None, (), 1.0),
        (None, ("state",), STATE_ROOM),
        (2.5, (), 2.5),
        (2.5, ("state",), 2.5),
        (1.0, ("state",), 1.0),
    ],
)
def test_the_margin_of_the_state(margin, widened, factor):
    layer = small_layer()
    layer = replace(layer, rules=replace(RULES, room=RoomRules(state_margin=margin)))
    plan = plan_layer(layer, widened, None, RangeRule.MAX)
    seen = seen_ranges(layer.program, layer.observed, None)
    largest = max(seen["state"], seen["state/new"], seen["state/kept"])
    assert plan.ranges["state"] == pytest.approx(factor * largest)
    # Scales are reciprocals of odd integers where that costs little.
    assert plan.tensors["state"].limit == pytest.approx(factor * largest, rel=0.03)


def test_wide_values_get_room_and_narrow_ones_none():
    layer = small_layer()
    seen = seen_ranges(layer.program, layer.observed, None)
    narrow, wide = (plan_layer(layer, w, None, RangeRule.MAX) for w in ((), ("v", "o")))
    for name in ("v", "rhs", "o/old"):
        assert narrow.ranges[name] == pytest.approx(seen[name])
        assert wide.ranges[name] == pytest.approx(WIDE_ROOM * seen[name])
    assert narrow.ranges["v_new"] == wide.ranges["v_new"] == pytest.approx(seen["v_new"])


@pytest.mark.parametrize("rule", [RangeRule.MSE, RangeRule.PERCENTILE])
def test_clipping_narrows_values_only(rule):
    chunks = random_chunks(batch=5, number=16)
    chunks.v[0, 0, 1, 3, 2] = 10.0
    layer = layer_of(step_program(), chunks, replace(RULES, narrow=INT4))
    full, clipped = (plan_layer(layer, (), None, r) for r in (RangeRule.MAX, rule))
    smaller = {name for name in full.ranges if clipped.ranges[name] < full.ranges[name]}
    assert smaller
    assert all(clipped.ranges[name] <= full.ranges[name] for name in full.ranges)
    values = {n for g in layer.widths.value_groups if g != "state" for n in layer.widths.groups[g]}
    assert smaller <= values


@pytest.mark.parametrize("fmt", [INT16, INT8X2])
def test_two_planes_are_requantized_by_division(fmt):
    layer = small_layer()
    layer = replace(layer, rules=replace(layer.rules, wide=fmt, equal_widths=fmt == INT16))
    plan = plan_layer(layer, ("v", "o", "state", "v_new"), None, RangeRule.MAX)
    assert str(plan.requantize) == ("multiplier" if fmt == INT16 else "divide")
    assert plan.tensors["v"].format == fmt


def test_scales_are_powers_of_two_where_they_must_be():
    layer = small_layer()
    layer = replace(layer, rules=replace(layer.rules, scales=ScaleRule.POW2))
    plan = plan_layer(layer, ("v",), None, RangeRule.MAX)
    assert all(torch.tensor(q.scale).log2() % 1 == 0 for q in plan.tensors.values())


def test_exponents_make_channels_equally_large():
    layer = small_layer(outlier=50.0)
    exponents = value_exponents(layer.observed, ["v"])
    assert len(exponents) == HEADS
    assert all(len(row) == VALUES for row in exponents)
    largest = layer.observed.largest["v"] * torch.exp2(-torch.tensor(exponents, dtype=torch.float32))
    assert 2**-0.5 * 0.999 <= float(largest.min()) <= float(largest.max()) <= 2**0.5 * 1.001
    assert exponents[0][0] - exponents[0][1] >= 3
    channels = ValueChannels(exponents=exponents)
    assert seen_ranges(layer.program, layer.observed, channels)["v"] <= 2**0.5 * 1.001
    # Scaled channels and what they hold commute: the plan's values are as large as the factors say.
    scaled = plan_layer(layer, (), channels, RangeRule.MAX)
    assert scaled.channels == channels
    raw = plan_layer(layer, (), None, RangeRule.MAX)
    exact = layer.truth.out[..., 1:]
    errors = [
        float((run_integers(p, layer.sample, p.channels).out[..., 1:] - exact).norm() / exact.norm())
        for p in (raw, scaled)
    ]
    assert errors[1] < 0.3 * errors[0]


def test_exponents_of_zeros_and_of_infinities_are_legal():
    layer = small_layer()
    largest = torch.zeros(HEADS, VALUES)
    zeros = replace(layer.observed, largest={**layer.observed.largest, "v": largest})
    assert value_exponents(zeros, ["v"]) == ((0,) * VALUES,) * HEADS
    largest = torch.ones(HEADS, VALUES)
    largest[0, 0], largest[1, 1], largest[2, 2] = torch.inf, 0, 2**-100
    found = value_exponents(replace(zeros, largest={"v": largest}), ["v"])
    assert found[0][0] == MAX_EXPONENT
    assert found[1][1] == found[2][2] == -MAX_EXPONENT


@planned
def test_decays_reach_one_whatever_the_data_showed(decay, form, widened):
    layer, plan = made(decay, form, widened)
    names = [n for n in plan.tensors if n.startswith(("decay_", "D/lower")) and not n.endswith("/log")]
    assert len(names) > 3
    # The data decay by a half in each chunk.
    assert float(layer.observed.largest["decay_kept"].max()) < 0.8
    for name in names:
        assert plan.ranges[name] == 1.0
        assert 1 / plan.tensors[name].scale == pytest.approx(round(1 / plan.tensors[name].scale))


@planned
def test_the_proof_tells_what_needs_data(decay, form, widened):
    layer, plan = made(decay, form, widened)
    proof = plan.proof()
    parts = (proof.cannot_saturate, proof.covered, tuple(proof.may_saturate), proof.partial, proof.unproved)
    assert sorted(name for part in parts for name in part) == sorted(plan.tensors)
    assert {*proof.unproved} <= layer.program.depends_on("v", "state") | {"v", "state"} | BETAS
    assert {"v", "state", "v_new", "state/new", "o"} <= {*proof.unproved}
    assert {"T", "M", "gram", "decay_kept"} & {*plan.tensors} <= {*proof.covered, *proof.cannot_saturate}
    assert "for any inputs" in str(proof)
    assert proof.accumulator_bound < 2**31
    assert proof.max_beta == 1.0


def test_the_proof_of_a_step_holds_for_the_beta_that_it_was_built_for():
    program = step_program(max_beta=2.0)
    layer = replace(layer_of(program, random_chunks(top=2.0)), max_beta=2.0)
    plan = plan_layer(layer, (), None, RangeRule.MAX)
    assert plan.proof().max_beta == 2.0
    assert plan.ranges["beta"] == 2.0
    assert "beta <= 2," in str(plan.proof())


def test_groups_are_those_of_the_program():
    assert width_groups(step_program()) == small_layer().widths
    assert RULES.narrow == INT8
