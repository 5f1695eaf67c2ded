"""Tables of costs, found file by file, and what they say of plans."""

from dataclasses import replace
from functools import cache

import pytest
from added_modules import added

import qinvert
from qinvert.errors import PlanError
from qinvert.hardware import HARDWARE, Hardware, Table, find_hardware
from qinvert.hardware._hardware import MAX_CHAINS, width_of
from qinvert.profiles import PROFILES
from qinvert.stress import stress_matrices

WHOLE = {"call": 100, "product": 5, "elementwise": 2, "move/KiB": 1}
CHAINED = {"call": 10, "product": 5, "elementwise": 2, "move": 1}
TOY = Hardware(
    name="toy",
    summary="a chip for tests",
    unit="ticks",
    source="a test",
    date="2026-11-29",
    error=0.0,
    correlation=1.0,
    targets=("npu-qdq-int8",),
    tables={1: Table(whole=WHOLE, chained=CHAINED)},
)
SOURCE = """
from dataclasses import replace

from qinvert.hardware.hexagon_v81 import HARDWARE as OTHER

HARDWARE = replace(OTHER, name="toy")
"""


@cache
def planned(bits=8, target="npu-qdq-int8"):
    lower = stress_matrices("correlated_keys", 8, 16)
    return qinvert.calibrate(lower, method=qinvert.elimination(16), bits=bits, target=target).layer()


def test_a_cost_is_the_sum_of_weights_times_what_is_counted():
    plan = planned()
    # Four levels: a mask each, and what the identity on the diagonal takes.
    masks_and_shifts = 8
    assert TOY.cost(plan, 4) == 100 + 4 * 5 + masks_and_shifts * 2
    assert TOY.cost(plan, 4, chains=2) == 10 + 2 * (4 * 5 + masks_and_shifts * 2) + 3
    # M, the corner and S: what enters and leaves.
    ends = replace(TOY, tables={1: Table(whole={"ends/KiB": 1.0}, chained={})})
    assert ends.cost(plan, 4) == 4 * 2 * 16 * 16 / 1024


@pytest.mark.parametrize("name", HARDWARE)
def test_costs_grow_with_the_batch(name):
    chip, plan = find_hardware(name), planned()
    whole = [chip.cost(plan, batch) for batch in (1, 2, 3, 5, 8)]
    assert whole == sorted(set(whole))
    if chip.tables[min(chip.tables)].chained:
        chained = [chip.cost(plan, batch, chains=batch) for batch in (2, 3, 5, 8)]
        assert chained == sorted(set(chained))


def test_the_best_chains_are_the_cheaper_of_none_and_as_many_as_divide_the_batch():
    plan = planned()
    for chip in (TOY, replace(TOY, tables={1: Table(whole=CHAINED, chained=WHOLE)})):
        for batch in (1, 3, 8):
            costs = {chains: chip.cost(plan, batch, chains) for chains in (1, batch)}
            assert chip.best_chains(plan, batch) == min(costs.items(), key=lambda item: item[1])
    cheap = replace(TOY, tables={1: Table(whole={"call": 1e9}, chained={"call": 1.0})})
    assert cheap.best_chains(plan, 8)[0] == 8
    assert cheap.best_chains(plan, 7)[0] == 7
    # Beyond the limit a divisor below it, or none at all.
    assert cheap.best_chains(plan, 2 * MAX_CHAINS)[0] == MAX_CHAINS
    assert cheap.best_chains(plan, 127)[0] == 1


def test_a_chip_without_costs_of_chains_has_no_use_for_them():
    chip = replace(TOY, tables={1: Table(whole=WHOLE, chained={})})
    assert chip.best_chains(planned(), 8) == (1, chip.cost(planned(), 8))
    with pytest.raises(PlanError, match="'toy' has no costs of graphs in 2 chains; use chains=1"):
        chip.cost(planned(), 8, chains=2)


def test_the_table_is_that_of_the_widest_tensor_or_the_widest_there_is():
    narrow, wide = planned(), planned(16, "hexagon-int16")
    assert (width_of(narrow), width_of(wide)) == (1, 2)
    assert width_of(planned("8x2", "int-ops")) == 2
    one, two = (Table(whole={"call": cost}, chained={}) for cost in (1.0, 2.0))
    for tables, costs in (({1: one, 2: two}, (1, 2)), ({1: one}, (1, 1)), ({2: two}, (2, 2))):
        chip = replace(TOY, tables=tables)
        assert (chip.cost(narrow), chip.cost(wide)) == costs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, r"batch 0 is not in \[1, 65536\]"),
        ({"batch": 2.0}, "batch 2.0 is not in"),
        ({"chains": 0}, r"chains 0 is not in \[1, 65536\]"),
        ({"chains": True}, "chains True is not in"),
        ({"batch": 8, "chains": 3}, "batch 8 cannot be cut into 3 chains; choose a divisor"),
        ({"batch": 2, "chains": 4}, "batch 2 cannot be cut into 4 chains"),
    ],
)
def test_batches_and_chains_that_do_not_fit_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        TOY.cost(planned(), **options)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"products": 1.0}, r"has the weight 'products': 1.0; .* their names are call, .*product/Mmac"),
        ({"product": -1.0}, "has the weight 'product': -1.0; weights are at least 0"),
        ({"move": float("nan")}, "has the weight 'move': nan"),
        ({}, "no weights of graphs in one chain"),
    ],
)
def test_a_table_says_which_weights_are_legal(weights, message):
    with pytest.raises(PlanError, match=message):
        Table(whole=weights, chained={})
    if weights:
        with pytest.raises(PlanError, match=message):
            Table(whole={"call": 1.0}, chained=weights)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "Toy chip", "'Toy chip' is not lower-case words joined by '-'"),
        ("targets", (), r"'toy' has the targets \(\); name at least one of .*npu-qdq-int8"),
        ("targets", ("npu",), r"'toy' has the targets \('npu',\)"),
        ("step_targets", ("npu",), r"'toy' has the targets \('npu-qdq-int8', 'npu'\)"),
        ("tables", {}, r"'toy' has tables for \[\] bytes; give one for 1 or 2"),
        ("tables", {4: TOY.tables[1]}, r"'toy' has tables for \[4\] bytes"),
    ],
)
def test_a_chip_names_the_field_that_is_wrong(field, value, message):
    with pytest.raises(PlanError, match=message):
        replace(TOY, **{field: value})


def test_a_file_is_a_chip_until_it_is_gone(tmp_path):
    before = dict(HARDWARE)
    with added("qinvert.hardware", tmp_path, toy=SOURCE) as package:
        package.discover()
        assert HARDWARE.keys() - before.keys() == {"toy"}
        plan = qinvert.calibrate(stress_matrices("ones", 4, 8), hardware="toy")
        assert plan.provenance["hardware"] == "toy"
    assert before == HARDWARE
    with pytest.raises(PlanError, match=r"unknown hardware 'toy'; use one of .*hexagon-v73"):
        find_hardware("toy")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", r"qinvert\.hardware\.toy defines no HARDWARE of type Hardware"),
        (SOURCE.replace('"toy"', '"hexagon-v81"'), r"hexagon_v81 and .*\.toy both define 'hexagon-v81'"),
    ],
)
def test_a_module_that_is_no_chip_is_refused_and_changes_nothing(source, message, tmp_path):
    before = dict(HARDWARE)
    with added("qinvert.hardware", tmp_path, toy=source) as package:
        with pytest.raises(PlanError, match=message):
            package.discover()
        assert before == HARDWARE


def test_chips_and_profiles_name_each_other():
    assert {profile.hardware for profile in PROFILES.values()} - {""} <= HARDWARE.keys()
    assert all(chip.name == name for name, chip in HARDWARE.items())
    for chip in HARDWARE.values():
        assert {*chip.targets, *chip.step_targets} <= PROFILES.keys()
        # A plan on which the widest format of a target is needed has one at the end of the list.
        widths = [max(f.container_bits * f.planes for f in PROFILES[t].formats) for t in chip.targets]
        assert widths == sorted(widths)
