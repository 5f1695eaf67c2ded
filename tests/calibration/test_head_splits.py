import warnings

import numpy as np
import pytest
import torch

import qinvert
from qinvert.calibration.head_errors import HeadErrors
from qinvert.calibration.head_splits import LEAST_GAIN_DB, Split, heads_by_layer
from qinvert.cautions import MissedGoalWarning
from qinvert.errors import PlanError
from qinvert.stress import stress_matrices


def heads(*factors, size=32):
    """Heads ``[len(factors), 16, size, size]`` of entries that are smaller by a factor each."""
    lower = stress_matrices("correlated_keys", 16, size, 0)
    return torch.stack([factor * lower for factor in factors])


def errors(*decibels):
    return [HeadErrors(head=i, sqnr_db=x, signal_share=1 / len(decibels)) for i, x in enumerate(decibels)]


def shapes(plan):
    """What a plan computes, entry by entry."""
    return {name: (layer.program, dict(layer.tensors)) for name, layer in plan.layers.items()}


@pytest.fixture(scope="module")
def source():
    """A layer whose quiet head needs grids of its own, and one whose heads are alike."""
    return {"a": heads(1, 0.05), "b": heads(1, 0.5)}


@pytest.fixture(scope="module")
def plan(source):
    with warnings.catch_warnings():
        warnings.simplefilter("error", MissedGoalWarning)
        return qinvert.calibrate(source, granularity="auto")


def test_only_the_layer_whose_head_misses_the_goal_is_split(source, plan):
    assert list(plan.layers) == ["a/head_0", "a/head_1", "b"]
    assert plan.provenance["granularity"] == "auto"
    apart = shapes(qinvert.calibrate(source, granularity="head"))
    with pytest.warns(MissedGoalWarning, match="granularity='auto'"):
        whole = shapes(qinvert.calibrate(source))
    expected = {"a/head_0": apart["a/head_0"], "a/head_1": apart["a/head_1"], "b": whole["b"]}
    assert shapes(plan) == expected


def test_the_quiet_head_gains_on_other_data(plan):
    lower = stress_matrices("correlated_keys", 16, 32, 1)
    seen = {"a": torch.stack([lower, 0.05 * lower]), "b": torch.stack([lower, 0.5 * lower])}
    report = qinvert.simulate(plan, seen)
    assert report.layers["a/head_1"].sqnr_db > 20
    facts = plan.layers["a/head_1"].provenance
    assert facts["whole_sqnr_db"] < 20 < facts["unseen"]["sqnr_db"]
    assert "whole_sqnr_db" not in plan.layers["b"].provenance


def test_layers_without_several_heads_are_planned_as_a_whole():
    lower = heads(1, 0.05)
    source = {"rows": lower[0], "one": lower[:1]}
    assert shapes(qinvert.calibrate(source, granularity="auto")) == shapes(qinvert.calibrate(source))


@pytest.mark.parametrize(
    ("whole", "apart", "helps"),
    [
        ((25, 15), (21, 22), True),
        # The worst head loses, though it is another one.
        ((25, 15, 16), (21, 22, 14.9), False),
        # No more heads reach the goal, and the worst gains less than a bit, or as much.
        ((25, 10), (25, 10 + LEAST_GAIN_DB - 0.1), False),
        ((25, 10), (25, 10 + LEAST_GAIN_DB), True),
        # Fewer reach it.
        ((25, 5), (19, 15), False),
    ],
)
def test_a_split_is_kept_where_it_helps(whole, apart, helps):
    split = Split(whole=errors(*whole), apart=errors(*apart), goal_db=20)
    assert split.helps is helps


def test_a_caution_says_what_grids_per_head_would_reach_where_they_do_not_help():
    # One large value sets the grids of the second head, shared or not.
    lower = torch.stack([heads(1)[0], stress_matrices("outlier", 16, 32, 0)])
    with pytest.warns(MissedGoalWarning) as caught:
        plan = qinvert.calibrate({"a": lower}, granularity="auto")
    assert list(plan.layers) == ["a"]
    (text,) = plan.layers["a"].provenance["head_cautions"]
    assert "grids per head would leave head 1 at" in text
    assert "bits='8x2'" in text
    assert "granularity=" not in text
    assert any(text in str(warning.message) for warning in caught)


def test_a_head_without_signal_asks_for_no_bits():
    lower = heads(1, 0.05, 1e-5)
    options = {"target": "npu-qdq-int16", "min_sqnr_db": 40}
    plan = qinvert.calibrate({"a": lower}, granularity="auto", **options)
    silent = plan.layers["a/head_2"]
    assert silent.formats == "int8"
    assert silent.provenance["meets_goal"]


def test_a_layer_with_a_head_of_zeros_stays_whole():
    with pytest.warns(MissedGoalWarning, match="other heads are zero"):
        plan = qinvert.calibrate({"a": heads(1, 0.05, 0)}, granularity="auto")
    assert list(plan.layers) == ["a"]


def test_a_checkpoint_ends_in_the_same_plan(source, plan, tmp_path):
    file = tmp_path / "seen.npz"
    first = qinvert.calibrate(source, granularity="auto", checkpoint=file)
    again = qinvert.calibrate(source, granularity="auto", checkpoint=file)
    assert first.to_bytes() == again.to_bytes() == plan.to_bytes()


@pytest.mark.parametrize(
    ("options", "given"),
    [({"scope": "chunk"}, "scope='chunk'"), ({"max_kl": 0.1}, "min_output_sqnr_db or max_kl")],
)
def test_goals_of_outputs_are_refused_before_work_starts(options, given):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(PlanError, match=given):
        qinvert.calibrate(model, np.zeros((1, 4), np.int64), granularity="auto", **options)


def test_heads_belong_to_layers_that_are_there_too():
    names = ["a", "a/head_0", "a/head_1", "b/head_0", "c"]
    assert heads_by_layer(names) == {"a": ["a/head_0", "a/head_1"], "b/head_0": [], "c": []}
