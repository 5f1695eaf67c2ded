"""Tokenized rows as libraries give them, against the same tokens one sequence at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import build, of_layers

import qinvert
from qinvert.calibration.data.token_batches import attended, token_batches
from qinvert.calibration.patching import delta_layers, device_of
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


class MapStyle:
    """A data set of torch: a length, and items by number, which end with no error of their own."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class Frame:
    """What is read of a table of pandas: iterating over it gives the names of columns."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows[0])

    def iterrows(self):
        return enumerate(self.rows)

    def to_dict(self, orient):
        assert orient == "records"
        return self.rows


class ArrowTable:
    """What is read of a table of Arrow."""

    def __init__(self, rows):
        self.rows = rows

    def to_pylist(self):
        return self.rows


def ragged(rows):
    """An array of arrays, as numpy and pandas hold rows of different lengths."""
    array = np.empty(len(rows), dtype=object)
    array[:] = rows
    return array


TENSORS = [torch.from_numpy(ids) for ids in IDS]
ROW_BY_ROW = {
    "a data set of torch": lambda: MapStyle(rows("torch")),
    "a data set without a base class": lambda: MapStyle([ids.tolist() for ids in IDS]),
    "tensors in tuples, as in a TensorDataset": lambda: MapStyle([(ids,) for ids in TENSORS]),
    "pandas": lambda: Frame(rows("numpy")),
    "pandas, a table for each row": lambda: [Frame([row]) for row in rows("numpy")],
    "arrow": lambda: ArrowTable(rows("list")),
    "arrow, batches": lambda: iter([ArrowTable(rows("list")[:2]), ArrowTable(rows("list")[2:])]),
    "an array of arrays": lambda: ragged(IDS),
}
AT_ONCE = {
    "lists in a list": lambda: [[ids.tolist() for ids in IDS]],
    "arrays in an array": lambda: [{"input_ids": ragged(IDS), "labels": ragged(IDS)}],
    "tensors of different lengths": lambda: [{"input_ids": TENSORS, "labels": TENSORS}],
    "a tuple of tensors of different lengths": lambda: [tuple(TENSORS)],
}


@pytest.mark.parametrize("kind", ROW_BY_ROW)
def test_data_sets_and_tables_of_any_library_are_read_row_by_row(kind):
    batches = list(token_batches(ROW_BY_ROW[kind]()))
    assert [batch["input_ids"].tolist() for batch in batches] == [[ids.tolist()] for ids in IDS]
    assert all(isinstance(value, torch.Tensor) for batch in batches for value in batch.values())


@pytest.mark.parametrize("kind", AT_ONCE)
def test_rows_of_different_lengths_are_one_batch(kind):
    (batch,) = token_batches(AT_ONCE[kind]())
    assert attended(batch).sum(1).tolist() == list(LENGTHS)
    assert all(
        row[: len(ids)].tolist() == ids.tolist() for row, ids in zip(batch["input_ids"], IDS, strict=True)
    )
    assert (batch.get("labels", torch.full((3, 129), -100))[~attended(batch)] == -100).all()


def test_a_loader_of_a_tensor_dataset_gives_batches():
    tokens = torch.arange(1, 21).reshape(4, 5)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=2)
    assert torch.cat([batch["input_ids"] for batch in token_batches(loader)]).tolist() == tokens.tolist()
    both = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens, tokens), batch_size=2)
    with pytest.raises(InputError, match="a list of 2 tensors"):
        list(token_batches(both))
    with pytest.raises(InputError, match="a list of 1 tensors"):
        list(token_batches([[torch.arange(4)]]))


def test_splits_are_named_and_positions_may_be_shared():
    with pytest.raises(InputError, match="a batch has train; it needs input_ids, or text; of the splits"):
        list(token_batches({"train": rows("list")}))
    given = {"input_ids": np.ones((3, 5), int), "position_ids": np.arange(5), "scores": np.arange(5)}
    (batch,) = token_batches(given)
    assert batch["position_ids"].tolist() == [list(range(5))] * 3
    assert batch["scores"].shape == (5,)


def test_data_sets_of_hugging_face_in_every_format():
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict(
        {name: [row[name] for row in rows("list")] for name in rows("list")[0]}
    )
    formats = [whole.with_format(name) for name in (None, "torch", "numpy", "pandas", "arrow")]
    streams = [whole.to_iterable_dataset(), whole.to_iterable_dataset().with_format("torch")]
    for given in (*formats, *streams, whole["input_ids"]):
        found = [batch["input_ids"].tolist() for batch in token_batches(given)]
        assert found == [[ids.tolist()] for ids in IDS]
    for given in (whole.batch(3), whole.with_format("torch").iter(3), whole.with_format("numpy")[:]):
        (batch,) = token_batches(given)
        assert attended(batch).sum(1).tolist() == list(LENGTHS)


class Wrapper(torch.nn.Module):
    """A class of a user's around a model."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner(**inputs)


WRAPPED = {
    "DataParallel": torch.nn.DataParallel,
    "a class around it": Wrapper,
    "in 16 bits": lambda model: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapper_changes_neither_names_nor_matrices(kind):
    pytest.importorskip("transformers")
    tokens, changes = torch.from_numpy(IDS[0])[None], of_layers("linear_attention", "full_attention")
    ((name, expected),) = qinvert.capture(build("qwen3_next", **changes), tokens)
    ((found, lower),) = qinvert.capture(WRAPPED[kind](build("qwen3_next", **changes)), tokens)
    assert found == name == "model.layers.0.linear_attn"
    assert torch.allclose(lower, expected, atol=1e-4 if kind == "in 16 bits" else 0)


def test_compiled_models_and_layers_keep_their_names():
    pytest.importorskip("transformers")
    # Nothing is compiled before the first call.
    model = build("qwen3_next", **of_layers("linear_attention"))
    assert list(delta_layers(torch.compile(model))) == ["model.layers.0.linear_attn"]
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert list(delta_layers(torch.compile(model))) == ["model.layers.0.linear_attn"]


def test_two_models_in_one_keep_their_names():
    pytest.importorskip("transformers")
    pair = torch.nn.ModuleList([build("qwen3_next", **of_layers("linear_attention")) for _ in range(2)])
    assert list(delta_layers(pair)) == [f"{i}.model.layers.0.linear_attn" for i in range(2)]


def test_weights_that_accelerate_offloads(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    tokens, changes = torch.from_numpy(IDS[0])[None], of_layers("linear_attention", "full_attention")
    expected = dict(qinvert.capture(build("qwen3_next", **changes), tokens))
    for offload in (accelerate.cpu_offload, lambda m, **o: accelerate.disk_offload(m, str(tmp_path), **o)):
        model = build("qwen3_next", **changes)
        offload(model, execution_device=torch.device("cpu"))
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        found = dict(qinvert.capture(model, tokens))
        assert all(torch.equal(found[name], lower) for name, lower in expected.items())


def test_the_text_part_of_a_larger_model_has_its_own_names():
    pytest.importorskip("transformers")
    model, tokens = build("glm5_next"), torch.from_numpy(IDS[0])[None]
    whole, part = (list(qinvert.capture(m, tokens)) for m in (model, model.model.language_model))
    assert [name for name, _ in part] == [name for name, _ in part if name.startswith("layers.")]
    for (name, expected), (inner, lower) in zip(whole, part, strict=True):
        assert name == f"model.language_model.{inner}"
        assert torch.equal(lower, expected)


def test_offloaded_weights_do_not_say_where_inputs_go():
    model = torch.nn.Linear(2, 2, device="meta")
    assert device_of(model) == torch.device("cpu")
    model._hf_hook = SimpleNamespace(execution_device=torch.device("cpu"))
    assert device_of(model) == torch.device("cpu")
    model._hf_hook = SimpleNamespace(execution_device="meta")
    assert device_of(model) == torch.device("meta")
