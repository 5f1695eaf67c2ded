import pytest
import torch

import qinvert
from qinvert import recall
from qinvert.calibration.head_errors import CARRIES, HeadErrors, head_errors, heads_below, worst_head
from qinvert.cautions import MissedGoalWarning
from qinvert.errors import PlanError
from qinvert.matrices import exact_inverse
from qinvert.metrics import ErrorStatistics
from qinvert.stress import stress_matrices


def errors(head, sqnr_db, share):
    return HeadErrors(head=head, sqnr_db=sqnr_db, signal_share=share)


def quiet_head(factor):
    """Two heads ``[2, 16, 32, 32]``, the second of smaller entries."""
    lower = stress_matrices("correlated_keys", 16, 32, 0)
    return torch.stack([lower, factor * lower])


def test_the_worst_head_is_the_worst_of_those_that_carry_signal():
    heads = [errors(0, 28.0, 0.9), errors(1, 0.0, CARRIES / 2), errors(2, 19.0, 0.1)]
    assert worst_head(heads).head == 2
    assert [h.head for h in heads_below(heads, 20)] == [2]
    assert heads_below(heads, 18) == []
    assert worst_head([]) is None
    assert heads_below([errors(0, 10.0, 1.0)], 20) == []


def test_shares_of_the_signal_add_up_to_one():
    lower = quiet_head(0.1)
    statistics = {}
    for head in (1, 0):
        exact = exact_inverse(lower[head])
        statistics[head] = ErrorStatistics()
        statistics[head].update(exact + 0.01 * torch.tril(torch.ones(32, 32), -1), exact)
    found = head_errors(statistics)
    assert [head.head for head in found] == [0, 1]
    assert sum(head.signal_share for head in found) == pytest.approx(1)
    assert found[0].signal_share > 0.9
    assert found[0].sqnr_db == statistics[0].sqnr_db


def test_a_share_beyond_one_is_refused():
    with pytest.raises(PlanError, match="shares are in"):
        errors(0, 20.0, 1.5)


def test_a_head_with_signal_below_the_goal_is_a_warning_with_its_remedy():
    source = {"a": quiet_head(0.05)}
    with pytest.warns(MissedGoalWarning, match=r"layer 'a'.*head 1 .* dB with 1\.\d% .*granularity='auto'"):
        plan = qinvert.calibrate(source)
    facts = plan.layers["a"].provenance
    assert facts["meets_goal"]
    head = facts["unseen"]["heads"][1]
    assert head["sqnr_db"] < 20
    assert head["signal_share"] < 0.02
    apart = qinvert.calibrate(source, granularity="head")
    assert all(layer.provenance["unseen"]["sqnr_db"] > 20 for layer in apart.layers.values())


def test_a_head_without_signal_and_a_head_at_the_goal_are_none():
    for factor in (0.5, 1e-4):
        facts = qinvert.calibrate({"a": quiet_head(factor)}).layers["a"].provenance
        assert facts["head_cautions"] == []


def test_reports_have_the_heads_with_their_shares():
    lower = quiet_head(0.05)
    layer = qinvert.simulate(qinvert.calibrate({"a": lower}), {"a": lower}).layers["a"]
    assert [head.sqnr_db for head in layer.heads] == list(layer.head_sqnr_db)
    assert layer.worst_head.head == 1
    assert layer.to_dict()["heads"][1]["signal_share"] == pytest.approx(layer.heads[1].signal_share)


def test_an_entry_of_one_head_has_one_sqnr_and_its_share_of_the_layer():
    # With a batch of three sequences: ``[batch, heads, chunks, C, C]``.
    lower = {"a": torch.stack([quiet_head(0.05)] * 3)}
    report = qinvert.simulate(qinvert.calibrate(lower, granularity="head"), lower)
    loud, quiet = (report.layers[f"a/head_{h}"] for h in (0, 1))
    assert loud.head_sqnr_db == (loud.sqnr_db,)
    assert quiet.head_sqnr_db == (quiet.sqnr_db,)
    assert quiet.heads[0].head == 1
    assert loud.heads[0].signal_share + quiet.heads[0].signal_share == pytest.approx(1)
    assert quiet.heads[0].signal_share < 0.02


def test_plans_of_models_list_every_head():
    pytest.importorskip("transformers")
    plan = qinvert.calibrate(recall.load_model(), recall.sequences(2), method="newton_schulz")
    for layer in plan.layers.values():
        heads = layer.provenance["unseen"]["heads"]
        assert [head["head"] for head in heads] == [0, 1]
        assert sum(head["signal_share"] for head in heads) == pytest.approx(1, abs=1e-5)
