import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import qinvert
from qinvert import recall
from qinvert.calibration.hooks import run_model
from qinvert.errors import InputError

pytest.importorskip("transformers")

UNSEEN = recall.sequences(64, seed=11)


@pytest.fixture(scope="module")
def model():
    return recall.load_model()


@pytest.fixture(scope="module")
def plan(model):
    return qinvert.calibrate(model, recall.sequences(64))


def no_inverse(lower):
    return torch.eye(lower.shape[-1]).expand(lower.shape)


def test_the_int8_inverse_recalls_everything(model, plan):
    result = qinvert.evaluate(model, plan, UNSEEN, score=recall.accuracy)
    assert result.exact_score == 1.0
    assert result.score == 1.0
    assert 0 < result.kl < 0.01
    assert result.top1_agreement > 0.98
    assert abs(result.loss_delta) < 0.01
    assert result.tokens == UNSEEN.numel()


def test_without_an_inverse_three_quarters_are_forgotten(model):
    result = qinvert.evaluate(model, no_inverse, UNSEEN, score=recall.accuracy)
    assert result.exact_score == 1.0
    assert result.score == pytest.approx(0.27, abs=0.04)
    assert result.kl > 1
    assert result.top1_agreement < 0.6


def test_the_truncated_series_forgets_more_than_no_inverse(model):
    program = qinvert.neumann(64, order=7)
    result = qinvert.evaluate(model, program.run, UNSEEN[:16], score=recall.accuracy)
    assert result.score < 0.2


def test_int8_stays_within_2_db_of_the_floor_on_unseen_sequences(model, plan):
    report = qinvert.simulate(plan, model, UNSEEN)
    for layer in report.layers.values():
        assert layer.matrices == 1024
        assert layer.loss_db < 2
        assert layer.sqnr_db > 30
    assert qinvert.range_growth(qinvert.capture(model, UNSEEN))["model.layers.1.linear_attn"].growth > 1e4


def test_the_exact_inverse_against_itself_is_perfect(model):
    result = qinvert.evaluate(model, qinvert.exact_inverse, UNSEEN[:2])
    assert result.kl < 1e-9
    assert result.top1_agreement == 1.0
    assert result.score is None
    logits = run_model(model, {"input_ids": UNSEEN[:2]})
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), UNSEEN[:2, 1:].flatten())
    assert result.loss == pytest.approx(float(expected), rel=1e-4)


def test_sequences_follow_the_rules_of_the_task():
    reads = writes = 0
    for row in UNSEEN.tolist():
        latest = {}
        for key, value in zip(row[::2], row[1::2], strict=True):
            assert 128 <= value < 160
            if key < 32:
                latest[key] = value
                writes += 1
            else:
                assert latest[key - 64] == value
                reads += 1
    assert 0.3 < reads / (reads + writes) < 0.4
    assert torch.equal(UNSEEN, recall.sequences(64, seed=11))
    assert int(recall.read_positions(UNSEEN).sum()) == reads


def test_a_model_that_turns_to_nan_is_not_called_perfect(model):
    result = qinvert.evaluate(model, lambda lower: lower * float("nan"), UNSEEN[:2], score=recall.accuracy)
    assert math.isnan(result.kl)
    assert math.isnan(result.loss_delta)
    assert result.to_dict()["kl"] is None
    assert result.score == 0.0


def test_tokens_without_a_read_have_no_accuracy(model, plan):
    writes = torch.tensor([[1, 130] * 64])
    result = qinvert.evaluate(model, plan, writes, score=recall.accuracy)
    assert math.isnan(result.score)
    assert result.to_dict()["score"] is None
    assert math.isfinite(result.kl)


@pytest.mark.parametrize("arguments", [(0, 1), (1, -1), (True, 0)])
def test_sequences_take_legal_counts_and_seeds(arguments):
    with pytest.raises(InputError, match=r"count|seed"):
        recall.sequences(*arguments)
