"""Tokenized rows as libraries give them, against the same tokens one sequence at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import build, of_layers

import qinvert
from qinvert.calibration.data.token_batches import attended, token_batches
from qinvert.calibration.patching import device_of
from qinvert.errors import InputError

LENGTHS = (70, 40, 129)
IDS = [np.random.default_rng(i).integers(1, 64, length) for i, length in enumerate(LENGTHS)]


def rows(kind):
    """Rows of a data set with a mask, labels, position ids, a text and a number, in some library's types."""
    convert = {"list": np.ndarray.tolist, "numpy": lambda x: x, "torch": torch.from_numpy}[kind]
    return [
        {
            "text": "as it was",
            "nothing": None,
            "input_ids": convert(ids),
            "attention_mask": convert(np.ones_like(ids)),
            "labels": convert(ids),
            "position_ids": convert(np.arange(len(ids))),
        }
        for ids in IDS
    ]


@pytest.mark.parametrize("kind", ["list", "numpy", "torch"])
def test_rows_of_a_data_set_are_batches_of_one(kind):
    for given in (rows(kind), iter(rows(kind))):
        batches = list(token_batches(given))
        assert len(batches) == len(IDS)
        for batch, ids in zip(batches, IDS, strict=True):
            assert set(batch) == {"input_ids", "attention_mask", "labels", "position_ids"}
            for value in batch.values():
                assert isinstance(value, torch.Tensor)
                assert value.shape == (1, len(ids))
            assert batch["position_ids"].tolist() == [list(range(len(ids)))]


@pytest.mark.parametrize("kind", ["list", "numpy"])
@pytest.mark.parametrize("masked", [True, False])
def test_lists_of_different_lengths_are_padded_with_a_mask(kind, masked):
    columns = {name: [row[name] for row in rows(kind)] for name in rows(kind)[0]}
    if not masked:
        del columns["attention_mask"]
    (batch,) = token_batches(columns | {"text": "one for all"})
    real = attended(batch)
    assert batch["input_ids"].shape == (3, 129)
    assert real.sum(1).tolist() == list(LENGTHS)
    assert [ids.tolist() for ids in IDS] == [
        row[mask].tolist() for row, mask in zip(batch["input_ids"], real, strict=True)
    ]
    assert (batch["labels"][~real] == -100).all()
    assert (batch["position_ids"][~real] == 0).all()


def test_a_model_sees_the_same_matrices_in_all_of_them():
    pytest.importorskip("transformers")
    model = build("qwen3_next", **of_layers("linear_attention", "full_attention"))
    expected = [lower for ids in IDS for _, lower in qinvert.capture(model, torch.from_numpy(ids)[None])]
    for given in (rows("list"), rows("torch")):
        found = [lower for _, lower in qinvert.capture(model, given)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_model_needs_no_head():
    pytest.importorskip("transformers")
    model = build("qwen3_next", **of_layers("linear_attention", "full_attention"))
    tokens = torch.from_numpy(IDS[0])[None]
    ((name, expected),) = qinvert.capture(model, tokens)
    # Labels are for the head, which is not there.
    ((inner, found),) = qinvert.capture(model.model, tokens)
    assert name == f"model.{inner}"
    assert torch.equal(found, expected)
    with pytest.raises(InputError, match="Qwen3NextModel returns no logits; pass the model with its head"):
        qinvert.evaluate(model.model, qinvert.exact_inverse, tokens)


def test_offloaded_weights_do_not_say_where_inputs_go():
    model = torch.nn.Linear(2, 2, device="meta")
    assert device_of(model) == torch.device("cpu")
    model._hf_hook = SimpleNamespace(execution_device=torch.device("cpu"))
    assert device_of(model) == torch.device("cpu")
    model._hf_hook = SimpleNamespace(execution_device="meta")
    assert device_of(model) == torch.device("meta")
