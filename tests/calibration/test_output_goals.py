import math
from types import SimpleNamespace

import pytest
import tiny_models
import torch

import qinvert
from qinvert import recall
from qinvert.calibration import output_goals
from qinvert.calibration.evaluate import Evaluation, LayerErrors
from qinvert.calibration.output_goals import MARGIN_DB, START_DB, OutputGoals, reach
from qinvert.cautions import MissedGoalWarning
from qinvert.errors import PlanError
from qinvert.stress import stress_matrices

TOKENS = torch.randint(0, tiny_models.VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(0))
LOWER = stress_matrices("correlated_keys", 8, 16)


def evaluation(kl, **outputs):
    """An evaluation of layers whose T is as good as its name says, and whose output is 30 dB better."""
    layers = {n: LayerErrors(t=x - 30, u=x, w=x, out=x, state=x) for n, x in outputs.items()}
    return Evaluation(kl=kl, top1_agreement=1, loss=1, loss_delta=0, tokens=4, layers=layers)


@pytest.mark.parametrize(
    "goals",
    [{"min_output_sqnr_db": math.nan}, {"min_output_sqnr_db": "20"}, {"max_kl": -1.0}, {"max_kl": math.nan}],
)
def test_goals_that_are_no_numbers_are_refused(goals):
    with pytest.raises(PlanError, match="is not a number"):
        qinvert.calibrate(LOWER, **goals)


@pytest.mark.parametrize("goals", [{"min_output_sqnr_db": 40}, {"max_kl": 1e-3}])
def test_matrices_have_no_outputs(goals):
    with pytest.raises(PlanError, match="need a model, not Tensor; pass the model"):
        qinvert.calibrate(LOWER, **goals)


def test_layers_lack_what_their_outputs_miss():
    goals = OutputGoals(min_output_sqnr_db=50)
    assert goals.lacking(evaluation(1.0, a=44.0, b=51.0)) == {"a": pytest.approx(6)}
    assert goals.lacking(evaluation(1.0, a=50.5, b=51.0)) == {}


def test_too_large_a_kl_is_taken_from_the_layers_with_the_noise():
    goals = OutputGoals(max_kl=1e-5)
    assert goals.lacking(evaluation(1e-5, a=20.0, b=60.0)) == {}
    lacking = goals.lacking(evaluation(1e-4, a=20.0, b=60.0))
    # Nearly all of the noise is a's: a tenth of it, shared by two layers, leaves 13 dB to take off.
    assert lacking == {"a": pytest.approx(13, abs=0.1)}
    assert goals.lacking(evaluation(math.nan, a=20.0, b=60.0)).keys() >= {"a"}


def planning(most):
    """Plans that reach what they are planned for, up to ``most`` dB of T."""
    plan = qinvert.calibrate(LOWER, method="newton_schulz").layer()

    def planned(name, goal_db):
        reached = min(most, goal_db)
        return SimpleNamespace(program=plan.program, tensors={"M": reached}, provenance={}, reached=reached)

    return planned


@pytest.fixture
def measured(monkeypatch):
    """Outputs of a model, of which layer a is 20 dB and layer b 40 dB better than its T."""
    seen = []

    def evaluate(model, plan, data):
        outputs = {n: p.reached + {"a": 20, "b": 40}[n] for n, p in plan.layers.items()}
        seen.append(outputs)
        found = evaluation(sum(10 ** (-x / 10) for x in outputs.values()), **outputs)
        layers = {
            n: LayerErrors(t=x - {"a": 20, "b": 40}[n], u=x, w=x, out=x, state=x) for n, x in outputs.items()
        }
        return Evaluation(kl=found.kl, top1_agreement=1, loss=1, loss_delta=0, tokens=4, layers=layers)

    monkeypatch.setattr(output_goals, "evaluate", evaluate)
    monkeypatch.setattr(output_goals, "Plan", lambda **fields: SimpleNamespace(**fields))
    return seen


def test_only_layers_that_lack_something_are_raised(measured):
    found = reach(None, [], ["a", "b"], OutputGoals(min_output_sqnr_db=50), planning(90))
    assert not found.lacking
    assert found.layers["a"].reached == pytest.approx(30 + MARGIN_DB)
    assert found.layers["b"].reached == START_DB
    assert len(measured) == 2


def test_a_goal_for_the_logits_is_reached(measured):
    found = reach(None, [], ["a", "b"], OutputGoals(max_kl=1e-6), planning(90))
    assert not found.lacking
    assert found.found.kl <= 1e-6


def test_the_end_of_the_ladder_ends_the_search(measured):
    found = reach(None, [], ["a", "b"], OutputGoals(min_output_sqnr_db=80), planning(25))
    assert found.lacking["a"] == pytest.approx(35)
    assert found.lacking["b"] == pytest.approx(15)
    assert len(measured) <= 4


def test_int4_meets_a_goal_for_the_logits_that_it_misses_for_t():
    pytest.importorskip("transformers")
    model = tiny_models.build("qwen3_5")
    options = {"bits": 4, "method": qinvert.block_merge(64, base=4)}
    by_t = qinvert.calibrate(model, TOKENS, min_sqnr_db=30, **options)
    assert not any(layer.provenance["meets_goal"] for layer in by_t.layers.values())
    by_kl = qinvert.calibrate(model, TOKENS, max_kl=1e-2, **options)
    assert all(layer.provenance["meets_goal"] for layer in by_kl.layers.values())
    found = qinvert.evaluate(model, by_kl, TOKENS)
    assert by_kl.provenance["kl"] == pytest.approx(found.kl, rel=0.01)
    assert found.kl <= 1e-2
    layer, errors = next(iter(found.layers.items()))
    facts = by_kl.layers[layer].provenance
    assert facts["output_sqnr_db"] == pytest.approx(errors.out, abs=1e-3)
    assert sum(head["output_share"] for head in facts["output_heads"]) == pytest.approx(1, abs=1e-3)
    with pytest.warns(MissedGoalWarning, match="the output lacks"):
        qinvert.calibrate(model, TOKENS, max_kl=0.0, **options)


def test_a_goal_for_outputs_is_reached_by_wider_grids():
    pytest.importorskip("transformers")
    model = tiny_models.build("qwen3_5")
    plan = qinvert.calibrate(
        model, TOKENS, min_output_sqnr_db=90, target="npu-qdq-int16", method=qinvert.block_merge(64, base=4)
    )
    assert all(layer.provenance["meets_goal"] for layer in plan.layers.values())
    assert min(layer.out for layer in qinvert.evaluate(model, plan, TOKENS).layers.values()) >= 90


def test_an_entry_of_one_head_has_the_output_of_that_head_alone():
    pytest.importorskip("transformers")
    model, tokens = recall.load_model(), recall.sequences(1)
    options = {"bits": 8, "method": "block_merge", "granularity": "head", "min_output_sqnr_db": 10.0}
    plan = qinvert.calibrate(model, tokens, **options)
    heads = {name: layer.provenance["output_heads"] for name, layer in plan.layers.items()}
    assert {name: [row["head"] for row in rows] for name, rows in heads.items()} == {
        f"model.layers.{layer}.linear_attn/head_{head}": [head] for layer in (0, 1) for head in (0, 1)
    }
