"""Which groups get more bits, which channels and ranges are chosen, and what a plan says of it."""

import json
from dataclasses import replace

import pytest
from chunk_layers import CHOICES, RULES, layer_of, random_chunks, small_layer, step_program

from qinvert.calibration.choices import RangeRule
from qinvert.calibration.chunk_steps.candidate import measure, plan_layer, with_provenance
from qinvert.calibration.chunk_steps.grids import RoomRules
from qinvert.calibration.chunk_steps.planner import choose_step
from qinvert.calibration.chunk_steps.widths import width_groups
from qinvert.calibration.planning.costs import costs_for
from qinvert.chunk_step.form import Decay, Form
from qinvert.formats import FLOAT32, INT4, INT8, INT16
from qinvert.plan.plan import Plan

COSTS = costs_for("npu-qdq-int16", None, "auto", 8)
NARROW = costs_for("npu-qdq-int8", None, 8, 8)


def chosen(layer=None, costs=COSTS, **changes):
    return choose_step(layer or small_layer(), replace(CHOICES, **changes), costs)


def reached(layer, widened):
    found = measure(layer, plan_layer(layer, widened, None, RangeRule.MAX))
    return min(found.sqnr_o_db, found.sqnr_state_db)


@pytest.mark.parametrize("goal", [20.0, 26.0, 30.0, 33.0])
def test_the_goal_is_reached_and_needs_every_wide_group(goal):
    layer = small_layer()
    choice = chosen(min_sqnr_db=goal)
    assert choice.meets_goal
    assert reached(layer, choice.best.widened) == choice.best.sqnr_db >= goal
    for group in choice.best.widened:
        assert reached(layer, tuple(g for g in choice.best.widened if g != group)) < goal
    assert (goal > reached(layer, ())) == bool(choice.best.widened)


def test_a_group_that_turned_out_useless_is_taken_back():
    """Every candidate that was tried and reaches the goal costs at least as much."""
    for goal in (26.0, 30.0, 33.0):
        choice = chosen(min_sqnr_db=goal)
        enough = [c.cost for c in choice.candidates if c.sqnr_db >= goal]
        assert choice.best.cost == min(enough)


def test_what_is_said_of_the_best_candidate_is_what_simulation_gives():
    layer, choice = small_layer(), chosen(min_sqnr_db=30.0)
    found = measure(layer, choice.best.plan)
    o, state = found.sqnr_o_db, found.sqnr_state_db
    assert (o, state) == (choice.best.sqnr_o_db, choice.best.sqnr_state_db)
    formats = {g: choice.best.plan.tensors[names[0]].format for g, names in layer.widths.groups.items()}
    assert {g for g, fmt in formats.items() if fmt == INT16} == {*choice.best.widened, "g"}


def test_a_goal_out_of_reach_gives_the_best_candidate_and_says_so():
    choice = chosen(min_sqnr_db=200.0)
    assert not choice.meets_goal
    assert choice.best.sqnr_db == max(c.sqnr_db for c in choice.candidates)
    document = choice.to_json(replace(CHOICES, min_sqnr_db=200.0))
    assert document["meets_goal"] is False
    lower = float(document["fix"].rpartition(" ")[2])
    assert document["fix"].startswith("no wider grid of this target helps; lower min_sqnr_db to ")
    # The advice is a goal that is reached.
    assert chosen(min_sqnr_db=lower).meets_goal


def test_targets_of_8_bits_are_told_of_wider_ones():
    rules = replace(RULES, wide=None)
    layer = layer_of(step_program(), random_chunks(), rules)
    choice = chosen(layer, NARROW, min_sqnr_db=60.0, widens=False)
    assert not choice.meets_goal
    fix = choice.to_json(replace(CHOICES, widens=False))["fix"]
    assert fix.startswith("pass bits='auto' with a target of 16 bits, such as npu-qdq-int16, or lower ")
    assert {q.format for q in choice.best.plan.tensors.values()} == {INT8}


def test_more_bits_cost_more():
    costs = {c.widened: c.cost for c in chosen(min_sqnr_db=200.0).candidates}
    assert min(costs.values()) == costs[()]
    assert max(costs, key=costs.get) == max(costs, key=len)
    ordered = [c.cost for c in chosen(min_sqnr_db=200.0).candidates]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize(
    ("bits", "wide"),
    [
        ({"value_bits": 16, "state_bits": 16}, {"v", "v_new", "o", "state"}),
        ({"value_bits": 16, "state_bits": 8}, {"v", "v_new", "o"}),
        ({"value_bits": 8, "state_bits": 16}, {"state"}),
        ({"value_bits": 8, "state_bits": 8}, set()),
    ],
)
def test_widths_that_the_caller_fixes_are_kept(bits, wide):
    choice = chosen(min_sqnr_db=1.0, **bits)
    assert {*choice.best.widened} == wide
    # Only keys are left to the planner.
    assert {*chosen(min_sqnr_db=200.0, **bits).best.widened} <= wide | {"k"}


def test_a_state_with_error_feedback_is_wide_and_read_narrow():
    layer = small_layer(error_feedback=True)
    best = chosen(layer, min_sqnr_db=1.0, value_bits=8, state_bits=16).best
    assert best.widened == ("state",)
    assert best.plan.tensors["state"].format == INT16
    assert best.plan.tensors["state/read"].format == INT8
    # Its margin is that of what the data show: a read that saturates is not carried.
    assert best.plan.tensors["state/read"].limit < best.plan.tensors["state"].limit / 2
    plain = chosen(small_layer(), min_sqnr_db=1.0, value_bits=8, state_bits=16).best
    assert best.cost < plain.cost


@pytest.mark.parametrize("wide", [INT16, None], ids=["16 bits", "8 bits"])
def test_a_state_in_float32_is_rounded_where_products_read_it_only(wide):
    layer = small_layer(error_feedback=True)
    carried = replace(layer, rules=replace(layer.rules, wide=wide, room=RoomRules(float_state=True)))
    bits = {"value_bits": 8, "state_bits": 16 if wide else 8, "widens": False}
    best = chosen(carried, min_sqnr_db=1.0, **bits).best
    tensors = best.plan.tensors
    floats = {name for name, grid in tensors.items() if grid.format == FLOAT32}
    assert floats == {"state", "state/kept", "state/new"}
    assert tensors["state/read"].format == INT8
    assert tensors["state/written"].format == (wide or INT8)
    rounded = chosen(layer, min_sqnr_db=1.0, value_bits=8, state_bits=8, widens=False).best
    assert best.sqnr_state_db > rounded.sqnr_state_db


def test_tensors_of_4_bits_stay_so_while_others_are_widened():
    layer = small_layer()
    four = replace(layer, widths=width_groups(layer.program, ("T", "rhs")))
    best = chosen(four, min_sqnr_db=200.0).best
    assert {*best.widened} <= {"v_new", "o", "state"} < {*chosen(layer, min_sqnr_db=200.0).best.widened}
    for name, grid in best.plan.tensors.items():
        assert (grid.format == INT4) == (name in four.widths.int4)
    # A quarter of the bits is lost, and nothing is gained: containers have 8 bits.
    plain, narrow = (chosen(x, min_sqnr_db=1.0).best for x in (layer, four))
    assert narrow.sqnr_db < plain.sqnr_db
    assert narrow.cost == plain.cost


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("decay", Decay)
def test_every_form_is_planned_and_gains_from_every_group(form, decay):
    layer = small_layer(decay, form)
    narrow, wide = chosen(layer, min_sqnr_db=1.0), chosen(layer, all_wide=True)
    assert wide.best.sqnr_db > 60
    assert 15 < narrow.best.sqnr_db < 40
    assert {*wide.best.widened} == {*layer.widths.value_groups, "k"}


def test_an_outlier_channel_is_divided_by_its_factor():
    layer = small_layer(outlier=40.0)
    free = chosen(layer, min_sqnr_db=1.0, equalize=None)
    names = {c.scaling.name for c in free.candidates}
    assert names == {"as they are", "scaled by v_new", "scaled by v_new, rhs, o"}
    assert free.best.plan.channels is not None
    plain = chosen(layer, min_sqnr_db=1.0, equalize=False)
    assert plain.best.plan.channels is None
    # The error of the large channel hides in a sum over all: the noise that is left is in the others.
    assert free.best.measured.channel_noise <= plain.best.measured.channel_noise
    forced = chosen(layer, min_sqnr_db=1.0, equalize=True)
    assert {c.scaling.name for c in forced.candidates} <= {"scaled by v_new", "scaled by v_new, rhs, o"}


def test_rotation_is_the_only_scaling_where_it_is_asked_for():
    layer = small_layer(outlier=40.0)
    choice = chosen(layer, min_sqnr_db=1.0, rotated=True, equalize=None)
    assert [c.scaling.name for c in choice.candidates] == ["rotated"]
    assert choice.best.plan.channels.rotated


def test_range_rules_are_tried_where_values_are_narrow():
    both = (RangeRule.MAX, RangeRule.MSE)
    assert {c.ranges for c in chosen(min_sqnr_db=1.0, ranges=both).candidates} == {*both}
    wide = chosen(min_sqnr_db=1.0, ranges=both, value_bits=16, state_bits=16)
    assert {c.ranges for c in wide.candidates} == {RangeRule.MAX}


def test_reasons_are_words_and_survive_the_file():
    layer, choices = small_layer(outlier=40.0), replace(CHOICES, min_sqnr_db=30.0, equalize=None)
    choice = choose_step(layer, choices, COSTS)
    document = choice.to_json(choices)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert len(document["rejected"]) == len(document["candidates"]) - 1
    assert sum(row["chosen"] for row in document["candidates"]) == 1
    assert all(" wide, channels " in reason and " dB" in reason for reason in document["rejected"])
    plan = Plan(layers={"a": with_provenance(choice.best.plan, document)}, target="npu-qdq-int16")
    again = Plan.from_bytes(plan.to_bytes())
    assert again == plan
    assert again.to_bytes() == plan.to_bytes()
    assert again.layer().channels == choice.best.plan.channels


def test_equal_layers_give_equal_plans():
    first, second = (layer_of(step_program(), random_chunks()) for _ in range(2))
    plans = [
        Plan(layers={"a": choose_step(x, CHOICES, COSTS).best.plan}, target="npu-qdq-int16").to_bytes()
        for x in (first, second)
    ]
    assert plans[0] == plans[1]
