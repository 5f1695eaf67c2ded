import pytest
import torch

import qinvert
from qinvert import recall
from qinvert.calibration.head_names import head_name, layer_name
from qinvert.calibration.heads import HEAD_AXIS, in_layer_order, natural_key, split_heads
from qinvert.errors import InputError, PlanError
from qinvert.stress import stress_matrices
from qinvert.systems import Systems


def loud_and_quiet(seed=0):
    """Two heads ``[2, 16, 32, 32]``, the second of entries 20 times smaller."""
    lower = stress_matrices("correlated_keys", 16, 32, seed)
    return torch.stack([lower, 0.05 * lower])


def test_every_head_gets_an_entry_and_grids_of_its_own():
    plan = qinvert.calibrate({"a": loud_and_quiet()}, granularity="head")
    assert list(plan.layers) == ["a/head_0", "a/head_1"]
    scales = [layer.input.scale for layer in plan.layers.values()]
    assert scales[0] > 10 * scales[1]


def test_quiet_heads_gain_many_decibels():
    seen, unseen = {"a": loud_and_quiet()}, {"a": loud_and_quiet(seed=1)}
    shared = qinvert.simulate(qinvert.calibrate(seen), unseen).layers["a"]
    apart = qinvert.simulate(qinvert.calibrate(seen, granularity="head"), unseen)
    assert shared.worst_head_sqnr_db == min(shared.head_sqnr_db) == shared.head_sqnr_db[1]
    assert apart.layers["a/head_1"].sqnr_db > shared.head_sqnr_db[1] + 10
    assert apart.totals()["a"] > shared.sqnr_db - 1


def test_totals_add_signal_and_noise_of_the_heads():
    lower = {"a": loud_and_quiet()}
    plan = qinvert.calibrate(lower, granularity="head")
    report = qinvert.simulate(plan, lower)
    exact = torch.tril(qinvert.exact_inverse(lower["a"]), -1)
    estimate = torch.stack([plan.layers[head_name("a", h)].inverse(lower["a"][h]) for h in (0, 1)])
    error = torch.tril(estimate.double() - exact, -1)
    expected = 20 * torch.log10(exact.norm() / error.norm())
    assert report.totals()["a"] == pytest.approx(float(expected), abs=1e-6)


def test_a_model_runs_with_a_plan_per_head_and_exports_a_graph_per_head(tmp_path):
    pytest.importorskip("transformers")
    model, tokens = recall.load_model(), recall.sequences(8)
    plan = qinvert.calibrate(model, tokens, granularity="head")
    assert len(plan.layers) == 4
    result = qinvert.evaluate(model, plan, tokens, score=recall.accuracy)
    assert result.score == 1.0
    captured = dict(qinvert.capture(model, tokens))
    for layer, lower in captured.items():
        for name, part in split_heads(layer, Systems(lower=lower)):
            assert layer_name(name) == layer
            qinvert.export(plan, tmp_path / "t.onnx", layer=name, batch=64)
            matrices = part.flat().lower
            assert all(r.mismatches == 0 for r in qinvert.verify(tmp_path / "t.onnx", plan, matrices))


def test_matrices_without_heads_or_with_others_are_refused():
    lower = loud_and_quiet()
    plan = qinvert.calibrate({"a": lower}, granularity="head")
    with pytest.raises(InputError, match="without a head axis"):
        qinvert.simulate(plan, {"a": lower[0]})
    with pytest.raises(PlanError, match="unknown layer 'a/head_2'"):
        qinvert.simulate(plan, {"a": torch.cat([lower, lower], HEAD_AXIS)})


def test_names_that_differ_in_numbers_are_ordered_by_them():
    names = [f"model.layers.{i}.attn" for i in range(12)]
    assert in_layer_order(sorted(names)) == names
    assert in_layer_order(["b.2", "a.10", "a.9"]) == ["b.2", "a.10", "a.9"]
    assert sorted(["a10b2", "a2", "a10b1", "a", "b1", "a02"], key=natural_key) == [
        "a", "a02", "a2", "a10b1", "a10b2", "b1",
    ]  # fmt: skip


def test_an_entry_of_one_head_knows_its_number_and_its_share_of_the_layer():
    sequences = torch.stack([loud_and_quiet(), loud_and_quiet(seed=1)])
    plan = qinvert.calibrate({"a": sequences}, granularity="head")
    heads = [layer.provenance["unseen"]["heads"] for layer in plan.layers.values()]
    assert [[row["head"] for row in each] for each in heads] == [[0], [1]]
    quiet = heads[1][0]["signal_share"]
    assert heads[0][0]["signal_share"] == pytest.approx(1 - quiet, abs=1e-3)
    exact = torch.tril(qinvert.exact_inverse(sequences), -1).square().sum((0, 2, 3, 4))
    assert quiet == pytest.approx(float(exact[1] / exact.sum()), rel=0.1)
