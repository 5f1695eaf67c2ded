"""What candidates cost, and for which target: chips that are named, chips of targets, and none."""

from dataclasses import replace

import pytest
from added_modules import added

import qinvert
from qinvert.calibration.planning.costs import MULTIPLY_ACCUMULATES, costs_for
from qinvert.errors import ExportError, PlanError
from qinvert.hardware import HARDWARE
from qinvert.plan.cost import plan_cost
from qinvert.plan.far_sums import far_sums_cost
from qinvert.profiles import PROFILES
from qinvert.program.residual_sums import has_sums
from qinvert.stress import stress_matrices

LOWER = stress_matrices("independent_keys", 16, 16)
CHIP = """
from qinvert.hardware._hardware import Hardware, Table

def chip(name, targets=("npu-qdq-int8",), **weights):
    return Hardware(
        name=name, summary="", unit="ticks", source="a test", date="2026-11-29", error=0.0, correlation=1.0,
        targets=targets, tables={1: Table(whole=weights, chained={})},
    )
"""


@pytest.fixture
def chips(tmp_path):
    """Return a function that adds chips by the arguments of `chip`."""
    entered = []

    def add(**arguments):
        sources = {name: f'{CHIP}\nHARDWARE = chip("{name}", {more})' for name, more in arguments.items()}
        context = added("qinvert.hardware", tmp_path, **sources)
        context.__enter__().discover()
        entered.append(context)

    yield add
    for context in entered:
        context.__exit__(None, None, None)


def moves_of(plan):
    return sum(node.op_type in ("Slice", "Concat") for node in graph_of(plan).node)


def graph_of(plan):
    from qinvert.export.exporting import build

    return build(plan, chains=1).graph


def test_a_chip_on_which_moves_are_expensive_gets_a_program_without_them(chips):
    chips(mover="product=1.0, elementwise=50.0", still="product=1.0, move=50.0")
    plans = {
        name: qinvert.calibrate(LOWER, method="block_merge", hardware=name) for name in ("mover", "still")
    }
    assert moves_of(plans["still"]) == 0
    assert has_sums(plans["still"].layer().program)
    assert plans["mover"].layer().program != plans["still"].layer().program
    for name, plan in plans.items():
        facts = plan.layer().provenance
        assert facts["meets_goal"]
        assert facts["cost"] == round(HARDWARE[name].best_chains(plan.layer(), 8)[1])
        # The cheapest of those that reach the goals: who is cheaper has a reason in the list.
        cheaper = [row for row in facts["candidates"] if row["cost"] < facts["cost"]]
        assert len(cheaper) <= len(facts["rejected"])
        # On each chip the choice costs less than what the other one has.
        other = plans["still" if name == "mover" else "mover"].layer()
        assert facts["cost"] < HARDWARE[name].cost(other, 8)


def test_costs_of_a_plan_are_those_of_the_chip_or_multiply_accumulates():
    lower = stress_matrices("correlated_keys", 8, 16)
    plan = qinvert.calibrate(lower, method="neumann_doubling", min_sqnr_db=0).layer()
    chip = costs_for("npu-qdq-int8", None, 8, 4)
    assert (chip.hardware, chip.named) == (HARDWARE[PROFILES["npu-qdq-int8"].hardware], False)
    assert chip.of(plan) == chip.hardware.best_chains(plan, 4)[1]
    assert chip.chains(plan) == {"chains": chip.hardware.best_chains(plan, 4)[0]}
    assert chip.provenance["batch"] == 4
    for target in ("int-ops", "qlinear"):
        cpu = costs_for(target, None, 8, 4)
        assert (cpu.hardware, cpu.chains(plan)) == (None, {})
        assert cpu.of(plan) == plan_cost(plan)
        assert cpu.provenance == {"cost_unit": MULTIPLY_ACCUMULATES}
    # Without a chip, QDQ graphs also pay for sums of grids that lie far apart.
    qdq = replace(costs_for("npu-qdq-int8", None, 8, 4), hardware=None)
    assert qdq.of(plan) == plan_cost(plan) + far_sums_cost(plan) > plan_cost(plan)


def test_a_named_chip_takes_the_place_of_the_targets_own():
    found = costs_for("npu-qdq-int8", "hexagon-v73", 8, 8)
    assert (found.hardware.name, found.profile.name) == ("hexagon-v73", "npu-qdq-int8")
    assert (found.named, found.targets) == (True, ())
    # A target without a chip of its own has costs of a chip that is named.
    assert costs_for("int-ops", "hexagon-v73", 8, 8).hardware.name == "hexagon-v73"


@pytest.mark.parametrize(
    ("bits", "profile"), [("auto", "hexagon-int16"), (8, "hexagon-uint8"), (16, "hexagon-int16")]
)
def test_a_chip_without_a_target_plans_for_its_profile_of_these_bits(bits, profile):
    found = costs_for(None, "hexagon-v81", bits, 8)
    assert (found.profile.name, found.targets) == (profile, ("hexagon-uint8", "hexagon-int16"))


@pytest.mark.parametrize(
    ("hardware", "profile"), [("hexagon-v73", "hexagon-uint16"), ("cpu-openvino", "qlinear")]
)
def test_whole_steps_have_the_targets_that_the_chip_names_for_them(hardware, profile):
    found = costs_for(None, hardware, "auto", 8, steps=True)
    assert found.profile.name == profile
    assert found.targets == (HARDWARE[hardware].step_targets or HARDWARE[hardware].targets)


@pytest.mark.parametrize(("bits", "target"), [(8, "npu-qdq-int8"), (16, "npu-qdq-int16"), ("8x2", "int-ops")])
def test_without_a_chip_the_target_is_the_first_that_takes_the_bits(bits, target):
    assert costs_for(None, None, bits, 8).profile.name == target


def test_the_target_is_the_narrowest_profile_that_holds_the_plan():
    narrow = qinvert.calibrate(LOWER, hardware="hexagon-v81", bits=8)
    wide = qinvert.calibrate(LOWER, hardware="hexagon-v81", bits=16)
    assert (narrow.target, wide.target) == ("hexagon-uint8", "hexagon-int16")
    costs = costs_for(None, "hexagon-v81", "auto", 8)
    assert costs.target_of([narrow.layer()]) == "hexagon-uint8"
    assert costs.target_of([narrow.layer(), wide.layer()]) == "hexagon-int16"
    # What no profile of the chip holds stays with the profile that it was planned for.
    planes = qinvert.calibrate(LOWER, bits="8x2").layer()
    assert costs.target_of([planes]) == costs.profile.name
    # A caller who names the target keeps it.
    named = costs_for("npu-qdq-int8", "hexagon-v81", 8, 8)
    assert named.target_of([narrow.layer()]) == "npu-qdq-int8"


def test_a_plan_remembers_its_chip_and_a_named_one_allows_three_decibels():
    named = qinvert.calibrate(LOWER, hardware="hexagon-v73", batch=2).provenance
    assert (named["hardware"], named["batch"], named["max_loss_db"]) == ("hexagon-v73", 2, 3.0)
    assert named["cost_unit"].endswith("for 2 matrices")
    default = qinvert.calibrate(LOWER).provenance
    assert (default["hardware"], default["max_loss_db"]) == (PROFILES["npu-qdq-int8"].hardware, 1.0)
    assert qinvert.calibrate(LOWER, hardware="hexagon-v73", max_loss_db=1).provenance["max_loss_db"] == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hardware": "hexagon"}, PlanError, r"unknown hardware 'hexagon'; use one of .*hexagon-v81"),
        ({"target": "npu"}, ExportError, "unknown profile 'npu'"),
        ({"batch": 0}, PlanError, r"batch 0 is not in \[1, 65536\]; pass the matrices per call"),
        ({"batch": 1.5}, PlanError, r"batch 1.5 is not in"),
        ({"hardware": "hexagon-v81", "bits": "8x2"}, PlanError, "takes int8.* not int8x2"),
    ],
)
def test_what_is_not_known_is_refused_before_the_work_starts(options, error, message):
    def source():
        raise AssertionError("the source was read")
        yield

    with pytest.raises(error, match=message):
        qinvert.calibrate(source(), **options)
