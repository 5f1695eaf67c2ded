import json
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import qinvert
from qinvert import recall
from qinvert.calibration.patching import run_model
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


def perturbed(layer_error):
    """The exact inverse times a factor that leaves nothing but that relative error."""
    return lambda lower: qinvert.exact_inverse(lower) * (1 + layer_error)


def test_an_error_of_t_is_followed_to_outputs_and_state(model):
    result = qinvert.evaluate(model, perturbed(1e-3), UNSEEN[:2])
    assert list(result.layers) == ["model.layers.0.linear_attn", "model.layers.1.linear_attn"]
    for errors in result.layers.values():
        for part in (errors.t, errors.u, errors.w):
            assert part == pytest.approx(60, abs=0.1)
        # What is wrong in U and W is wrong in the state; outputs read both.
        assert 40 < errors.state < 62
        assert 40 < errors.out < 62


def test_layer_errors_are_those_of_the_recurrence(model):
    """One layer's figures, from its captured systems and a float64 loop over its chunks."""
    plan = qinvert.calibrate(model, recall.sequences(4), bits=4)
    name = "model.layers.0.linear_attn"
    found = qinvert.evaluate(model, plan, UNSEEN[:2]).layers[name]
    # Nothing before the first layer depends on an inverse.
    item = next(qinvert.capture_details(model, UNSEEN[:2], details=("right_hand_sides",)))
    assert item.layer == name
    exact, other = qinvert.exact_inverse(item.lower), plan.layers[name].inverse(item.lower).double()
    for part, side in zip((found.u, found.w), item.right_hand_sides, strict=True):
        error = (other - exact) @ side.double()
        expected = 20 * math.log10(float((exact @ side.double()).norm() / error.norm()))
        assert part == pytest.approx(expected, abs=1e-3)
    below = torch.tril(exact, -1).norm() / torch.tril(other - exact, -1).norm()
    assert found.t == pytest.approx(20 * math.log10(float(below)), abs=1e-6)
    assert found.out > found.t - 20
    assert math.isfinite(found.state)


def test_the_exact_inverse_makes_no_error_in_any_layer(model):
    for errors in qinvert.evaluate(model, qinvert.exact_inverse, UNSEEN[:2]).layers.values():
        assert errors.t > 120
        assert (errors.u, errors.w, errors.out, errors.state) == (math.inf,) * 4


def test_plans_are_compared_in_one_pass_over_the_data(model, plan):
    plans = {"int8": plan, "none": no_inverse}
    together = qinvert.compare(model, plans, iter([UNSEEN[:2], UNSEEN[2:4]]), score=recall.accuracy)
    assert list(together) == ["int8", "none"]
    for name, inverse in plans.items():
        alone = qinvert.evaluate(model, inverse, [UNSEEN[:2], UNSEEN[2:4]], score=recall.accuracy)
        assert together[name] == alone
    worst = together["none"].layers["model.layers.1.linear_attn"]
    best = together["int8"].layers["model.layers.1.linear_attn"]
    assert worst.t == 0
    assert best.t > 25
    assert best.out > worst.out + 15
    assert best.state > worst.state + 15


def test_what_an_inverse_returns_is_checked(model):
    with pytest.raises(InputError, match="return a tensor of L's shape"):
        qinvert.evaluate(model, lambda lower: lower[..., :2], UNSEEN[:2])


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


def padded(tokens, side, amount=64):
    """Return a batch with padding of zeros beside every sequence."""
    ids = torch.zeros(len(tokens), tokens.shape[1] + amount, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    where = slice(amount, None) if side == "left" else slice(tokens.shape[1])
    ids[:, where], mask[:, where] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(model, plan, side):
    expected = qinvert.evaluate(model, plan, UNSEEN[:4])
    result = qinvert.evaluate(model, plan, [padded(UNSEEN[:4], side)])
    assert result.tokens == UNSEEN[:4].numel()
    assert result.kl == pytest.approx(expected.kl, rel=0.05)
    assert result.loss == pytest.approx(expected.loss, rel=1e-3)
    assert result.top1_agreement == pytest.approx(expected.top1_agreement, abs=0.01)


def test_the_loss_is_that_of_the_labels(model):
    labels = torch.where(recall.read_positions(UNSEEN[:2]).roll(1, 1), UNSEEN[:2], -100)
    result = qinvert.evaluate(model, qinvert.exact_inverse, [{"input_ids": UNSEEN[:2], "labels": labels}])
    logits = run_model(model, {"input_ids": UNSEEN[:2]})
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert result.loss == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    assert result.tokens == UNSEEN[:2].numel()


def test_the_loss_of_rows_in_a_file_is_that_of_their_labels(model, tmp_path):
    # Sequences as long as those that rows are packed into.
    tokens = UNSEEN[:2]
    labels = torch.where(recall.read_positions(tokens).roll(1, 1), tokens, -100)
    rows = zip(tokens.tolist(), labels.tolist(), strict=True)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": ids, "labels": wanted}) for ids, wanted in rows))
    found = qinvert.evaluate(model, qinvert.exact_inverse, path)
    expected = qinvert.evaluate(model, qinvert.exact_inverse, [{"input_ids": tokens, "labels": labels}])
    assert found.loss == expected.loss


def test_a_state_that_padding_has_erased_is_not_called_exact(model, plan):
    erased = qinvert.evaluate(model, plan, [padded(UNSEEN[:1, :64], "right", 1024)])
    assert [errors.state for errors in erased.layers.values()] == [None, None]
    assert erased.to_dict()["layers"]["model.layers.0.linear_attn"]["state"] is None
    assert str(erased)
    kept = qinvert.evaluate(model, plan, [padded(UNSEEN[:1, :64], "left", 1024)])
    assert all(math.isfinite(errors.state) for errors in kept.layers.values())


def test_data_that_are_padding_alone_are_refused(model):
    batch = {"input_ids": UNSEEN[:2], "attention_mask": torch.zeros_like(UNSEEN[:2])}
    with pytest.raises(InputError, match="attention_mask is 0 for every token"):
        qinvert.evaluate(model, qinvert.exact_inverse, [batch])


@pytest.mark.parametrize("kind", ["npz", "safetensors", "jsonl"])
def test_a_file_with_a_mask_plans_for_real_tokens(model, kind, tmp_path):
    tokens, path, options = recall.sequences(8), tmp_path / f"t.{kind}", {"method": "block_merge", "bits": 8}
    # A whole number of chunks, so that the chunks of the real tokens are the same.
    fields = padded(tokens, "left")
    if kind == "npz":
        np.savez(path, **{name: x.numpy() for name, x in fields.items()})
    elif kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(fields, path)
    else:
        rows = (
            dict(zip(fields, row, strict=True))
            for row in zip(*(x.tolist() for x in fields.values()), strict=True)
        )
        path.write_text("\n".join(map(json.dumps, rows)))
    assert qinvert.calibrate(model, path, **options) == qinvert.calibrate(model, tokens, **options)
    found, expected = (qinvert.evaluate(model, no_inverse, data) for data in (path, tokens))
    assert found.tokens == expected.tokens
    assert found.kl == pytest.approx(expected.kl, rel=1e-3)
