"""Masks and labels beside token ids, from every kind of data."""

import json

import numpy as np
import pytest
import torch

import qinvert
from qinvert.calibration.data.token_batches import token_batches
from qinvert.errors import InputError

IDS = np.arange(1, 21, dtype=np.int64).reshape(4, 5)
MASK = (np.arange(5) >= np.array([[0], [1], [2], [4]])).astype(np.int64)


def written(kind, tmp_path):
    path, fields = tmp_path / f"tokens.{kind}", {"input_ids": IDS, "attention_mask": MASK, "labels": IDS - 1}
    if kind == "npz":
        np.savez(path, **fields)
    else:
        save = pytest.importorskip("safetensors.numpy").save_file
        save(fields, path)
    return path


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_files_give_their_masks_and_labels(kind, tmp_path):
    path = written(kind, tmp_path)
    batches = list(token_batches(path, batch_size=3))
    assert [len(batch["input_ids"]) for batch in batches] == [3, 1]
    for name, expected in (("input_ids", IDS), ("attention_mask", MASK), ("labels", IDS - 1)):
        assert np.array_equal(torch.cat([batch[name] for batch in batches]), expected)
    (drawn,) = token_batches(qinvert.TokenData(data=path, num_samples=2, seed=3))
    rows = [IDS.tolist().index(row) for row in drawn["input_ids"].tolist()]
    assert drawn["attention_mask"].tolist() == MASK[rows].tolist()
    (cut,) = token_batches(qinvert.TokenData(data=path, seq_len=2))
    assert cut["attention_mask"].tolist() == MASK[:, :4].reshape(-1, 2).tolist()


def test_labels_of_rows_are_packed_with_their_ids(tmp_path):
    path, labels = tmp_path / "rows.jsonl", np.where(IDS % 3 == 0, -100, IDS)
    every = [
        {"input_ids": ids.tolist(), "labels": wanted.tolist()}
        for ids, wanted in zip(IDS, labels, strict=True)
    ]
    every[1] |= {"attention_mask": MASK[1].tolist()}
    del every[2]["labels"]
    path.write_text("\n".join(map(json.dumps, every)))
    (batch,) = token_batches(qinvert.TokenData(data=path, seq_len=19))
    kept = np.array([True] * 5 + [False] + [True] * 14)
    assert batch["input_ids"].tolist() == [IDS.flatten()[kept].tolist()]
    expected = np.concatenate([labels[0], labels[1], IDS[2], labels[3]])[kept]
    assert batch["labels"].tolist() == [expected.tolist()]
    # A class of a row is no label of a token; without labels there are none.
    path.write_text("\n".join(json.dumps({"input_ids": row["input_ids"], "labels": 1}) for row in every))
    (batch,) = token_batches(qinvert.TokenData(data=path, seq_len=20))
    assert set(batch) == {"input_ids"}
    path.write_text('{"input_ids": [1, 2], "labels": [1]}')
    with pytest.raises(InputError, match="line 1 has 2 token ids and 1 numbers in labels"):
        list(token_batches(path))


def test_padding_of_rows_is_not_packed(tmp_path):
    rows = [
        json.dumps({"input_ids": ids, "attention_mask": mask})
        for ids, mask in zip(IDS.tolist(), MASK.tolist(), strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (batch,) = token_batches(qinvert.TokenData(data=tmp_path / "rows.jsonl", seq_len=13))
    assert batch["input_ids"].tolist() == [IDS[MASK == 1].tolist()]
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [1, 2], "attention_mask": [1]}')
    with pytest.raises(InputError, match="line 1 has 2 token ids and 1 numbers in attention_mask"):
        list(token_batches(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("kind", [list, np.asarray, torch.as_tensor])
def test_masks_of_batches_become_tensors(kind):
    given = {"input_ids": kind(IDS.tolist()), "attention_mask": kind(MASK.tolist())}
    (batch,) = token_batches([given])
    assert torch.equal(batch["attention_mask"], torch.from_numpy(MASK))


def test_a_mask_of_another_size_is_refused(tmp_path):
    np.savez(tmp_path / "t.npz", input_ids=IDS, attention_mask=MASK[:, :4])
    with pytest.raises(InputError, match=r"attention_mask that does not fit input_ids of shape \[4, 5\]"):
        list(token_batches(tmp_path / "t.npz"))


def collated(rows):
    return torch.utils.data.DataLoader(rows, batch_size=2)


@pytest.mark.parametrize(
    "data",
    [
        collated([{"input_ids": row} for row in IDS.tolist()]),
        collated([{"input_ids": row, "attention_mask": row} for row in IDS.tolist()]),
        collated(IDS.tolist()),
        [tuple(torch.from_numpy(IDS[:2]))],
        [tuple(torch.from_numpy(IDS[:2, :2]))],
        [{"input_ids": list(torch.from_numpy(IDS[:2]))}],
        # The ids come as rows, what lies beside them as columns; as many rows as tokens, or another number.
        *(
            collated([{"input_ids": row, name: row.tolist()} for row in torch.from_numpy(IDS[:, :length])])
            for name in ("attention_mask", "labels", "position_ids")
            for length in (2, 5)
        ),
    ],
)
def test_lists_of_tensors_are_refused_as_sequences_or_columns(data):
    with pytest.raises(InputError, match=r"tensors \[\d\], of which nobody .* collate_fn .* pass one tensor"):
        list(token_batches(data))


def test_only_the_shape_of_the_ids_is_theirs():
    for other in (MASK.T, MASK.reshape(2, 10), MASK[0]):
        with pytest.raises(InputError, match=r"attention_mask that does not fit input_ids of shape \[4, 5\]"):
            list(token_batches([{"input_ids": IDS, "attention_mask": other}]))
    (batch,) = token_batches([{"input_ids": IDS[0], "attention_mask": MASK[0]}])
    assert batch["attention_mask"].tolist() == [MASK[0].tolist()]


def test_rows_that_are_tensors_are_collated_by_rows():
    rows = [
        {"input_ids": row, "attention_mask": mask} for row, mask in zip(torch.tensor(IDS), MASK, strict=True)
    ]
    first, second = token_batches(collated(rows))
    assert torch.equal(torch.cat([first["input_ids"], second["input_ids"]]), torch.from_numpy(IDS))
    assert torch.equal(torch.cat([first["attention_mask"], second["attention_mask"]]), torch.from_numpy(MASK))
