import numpy as np
import pytest
import tiny_models
import torch

import qinvert
from qinvert import recall
from qinvert.calibration.observation.data_record import DataRecord
from qinvert.cautions import DataWarning
from qinvert.errors import InputError


def record_of(*batches):
    record = DataRecord()
    list(record.follow(batches))
    return record


def test_tokens_are_counted_and_hashed_without_padding_and_batching():
    ids = torch.arange(20).reshape(2, 10)
    padded = {
        "input_ids": torch.cat([ids * 0, ids], 1),
        "attention_mask": torch.tensor([0, 1]).repeat_interleave(10).expand(2, 20),
    }
    whole = record_of({"input_ids": ids}).provenance
    assert whole["data"]["tokens"] == 20
    assert whole == record_of({"input_ids": ids[:1]}, {"input_ids": ids[1:]}).provenance
    assert whole == record_of(padded).provenance
    assert whole != record_of({"input_ids": ids.flip(0)}).provenance
    assert whole != record_of({"input_ids": ids.reshape(1, 20)}).provenance


def test_sequences_of_padding_alone_are_none():
    ids = torch.arange(40).reshape(4, 10)
    mask = torch.tensor([0, 1, 0, 1])[:, None].expand(4, 10)
    record = DataRecord(kept=3)
    empty = {"input_ids": ids, "attention_mask": mask * 0}
    list(record.follow([empty, {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}]))
    assert torch.cat([batch["input_ids"] for batch in record.first]).tolist() == ids[[1, 3, 0]].tolist()
    assert record.provenance == record_of({"input_ids": ids[[1, 3, 0, 1, 2, 3]]}).provenance
    with pytest.raises(InputError, match="longest sequence has 0 tokens"):
        record_of(empty).check(16)


def test_matrices_have_no_tokens():
    record = record_of(("layer", torch.zeros(2, 16, 16)))
    assert record.provenance == {}
    record.check(64)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (torch.tensor([[104, 101, 108, 108, 111]]), "longest sequence has 5 tokens, and a chunk 64; pass"),
        (torch.full((4, 256), 32), "1024 tokens are 1 different ones; pass"),
        (torch.tensor([[32, 10] * 64]), "2 different ones"),
        (torch.arange(63)[None], "63 tokens"),
    ],
)
def test_data_that_cannot_calibrate_is_refused_with_what_is_needed(ids, match):
    with pytest.raises(InputError, match=match):
        record_of({"input_ids": ids}).check(64)


def test_a_full_chunk_of_different_tokens_is_taken():
    record_of({"input_ids": torch.arange(64)[None]}).check(64)


@pytest.mark.parametrize("text", ["hello", " \n" * 4000, "hi\n"])
def test_a_model_refuses_such_texts(text):
    pytest.importorskip("transformers")
    model = tiny_models.build(
        "qwen3_5", vocab_size=256, **tiny_models.of_layers("linear_attention", "full_attention")
    )
    with pytest.raises(InputError, match="the data cannot calibrate"):
        qinvert.calibrate(model, [text], method="neumann", num_samples=2)


def test_a_plan_says_what_data_it_was_made_from():
    pytest.importorskip("transformers")
    plan = qinvert.calibrate(recall.load_model(), recall.sequences(2), method="neumann")
    assert plan.provenance["data"]["sequences"] == 2
    assert plan.provenance["data"]["tokens"] == 1024
    assert all(layer.provenance["matrices"] == 2 * 2 * 8 for layer in plan.layers.values())


def test_matrices_that_are_all_zero_miss_the_goal_with_a_warning():
    with pytest.warns(DataWarning, match="every matrix L was zero"):
        plan = qinvert.calibrate({"zero": np.zeros((4, 16, 16), np.float32)})
    facts = plan.layer().provenance
    assert not facts["meets_goal"]
    assert "pass data on which the layer is active" in facts["fix"]
