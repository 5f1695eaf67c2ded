"""``bits="auto"`` climbs through mixed formats as the goal rises."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import pytest
import torch

import qinvert
from qinvert.plan.plan import Plan
from qinvert.stress import stress_matrices

#: No loss against the floor is too much: the goal alone decides.
ANY_LOSS_DB = 200.0
METHOD = qinvert.block_merge(32, base=4, tile=16)
#: Goals in dB, closer together where plans mix formats.
GOALS = (30, 37, 40, 43, 46, 49, 52, 70)
LOWER = stress_matrices("half_random", 24, 32)


def _planned(goal_db: float, target: str) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return qinvert.calibrate(
            LOWER, method=METHOD, target=target, min_sqnr_db=goal_db, max_loss_db=ANY_LOSS_DB
        )


@pytest.fixture(scope="module")
def plans() -> dict[int, Plan]:
    return {goal: _planned(goal, "int-ops") for goal in GOALS}


def _rung(plan: Plan) -> tuple[float, float]:
    facts = plan.layer().provenance
    return facts["expected_sqnr_db"], facts["cost"]


def test_every_goal_is_reached(plans: dict[int, Plan]) -> None:
    assert all(_rung(plan)[0] >= goal for goal, plan in plans.items())


def test_cost_rises_with_the_goal(plans: dict[int, Plan]) -> None:
    costs = [_rung(plan)[1] for plan in plans.values()]
    assert all(earlier <= later for earlier, later in itertools.pairwise(costs))
    assert len(set(costs)) >= 5


def test_steps_are_at_most_6_db_until_one_format_of_more_bits_costs_a_tenth_more(
    plans: dict[int, Plan],
) -> None:
    # The last step is larger: no mixture between it and two planes everywhere is known to cost less.
    *mixed, (widest_db, widest_cost) = sorted({_rung(plan) for plan in plans.values()})
    assert all(after[0] - before[0] <= 6 for before, after in itertools.pairwise(mixed))
    assert widest_db > 70
    assert widest_cost <= 1.1 * mixed[-1][1]


@pytest.mark.parametrize("goal_db", [40, 49])
def test_mixed_plans_equal_onnxruntime_bit_for_bit(
    plans: dict[int, Plan], goal_db: int, tmp_path: Path
) -> None:
    plan = plans[goal_db]
    assert len({grid.format for grid in plan.layer().tensors.values()}) == 2
    path = tmp_path / "graph.onnx"
    qinvert.export(plan, path, profile="int-ops", batch=4)
    qinvert.verify(path, plan, LOWER[:4], runtimes=("onnxruntime",))


def test_mixed_plans_with_copies_pass_the_rules_of_their_target(
    plans: dict[int, Plan], tmp_path: Path
) -> None:
    copied = [plan for plan in plans.values() if "own_grids" in plan.layer().program.title]
    assert copied
    path = tmp_path / "graph.onnx"
    qinvert.export(copied[0], path, profile="int-ops", batch=2)
    qinvert.verify(path, copied[0], torch.flip(LOWER[:2], (0,)), runtimes=("onnxruntime",))
