import itertools
import json
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qinvert
from qinvert.calibration.data import documents
from qinvert.calibration.data.packing import draw, packed
from qinvert.calibration.data.token_batches import token_batches
from qinvert.calibration.data.tokenizers import BYTES, find_tokenizer
from qinvert.errors import InputError, MissingDependencyError


class Model(torch.nn.Module):
    """Knows what tokenizers are found by: a folder and the size of a vocabulary."""

    def __init__(self, vocabulary=256, folder=""):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocabulary)
        self.name_or_path = str(folder)


class Reader:
    def __init__(self, items):
        self.items = iter(items)

    def get_next(self):
        return next(self.items, None)


def sequences(data, model=None, **options):
    """Return all token ids, a row a sequence."""
    data = qinvert.TokenData(data=data, **options) if options else data
    return [row.tolist() for batch in token_batches(data, model or Model()) for row in batch["input_ids"]]


def flat(rows):
    return list(itertools.chain.from_iterable(rows))


def text_of(rows):
    return bytes(flat(rows)).decode()


texts_and_ids = st.lists(st.one_of(st.text(max_size=30), st.lists(st.integers(0, 255), max_size=30)))


@given(texts_and_ids, st.integers(1, 40))
def test_packing_loses_nothing_but_the_end(documents, length):
    rows = [ids.tolist() for ids, _ in packed([(d,) for d in documents], lambda: BYTES, length)]
    expected = []
    for number, document in enumerate(documents):
        if isinstance(document, str):
            expected += list((b"\n\n" if number else b"") + document.encode(errors="replace"))
        else:
            expected += document
    whole = len(expected) // length * length
    assert flat(rows) == (expected[:whole] if whole else expected)
    assert {len(row) for row in rows} <= ({length} if whole else {len(expected)})


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 2**63 - 1))
def test_a_sample_keeps_the_order_and_repeats_nothing(available, count, seed):
    rows = [np.array([i]) for i in range(available)]
    drawn = [int(row[0]) for row in draw(iter(rows), count, seed)]
    assert drawn == sorted(set(drawn))
    assert len(drawn) == min(count, available)
    assert drawn == [int(row[0]) for row in draw(iter(rows), count, seed)]


def test_every_sequence_has_the_same_chance():
    counts = np.zeros(12)
    for seed in range(2000):
        for row in draw((np.array([i]) for i in range(12)), 3, seed):
            counts[row[0]] += 1
    # Each count has mean 500 and deviation 19.
    assert abs(counts - 500).max() < 100


TEXT = "".join(f"Line {i}: äöü {'x' * (i % 7)}\n" for i in range(400))


@pytest.mark.parametrize("name", ["book.txt", "notes.md", "plain", "code.py"])
def test_a_file_of_any_name_is_text(tmp_path, name):
    (tmp_path / name).write_text(TEXT)
    rows = sequences(tmp_path / name, seq_len=64, num_samples=10**6)
    assert {len(row) for row in rows} == {64}
    assert bytes(flat(rows)) == TEXT.encode()[: 64 * len(rows)]
    assert len(TEXT.encode()) - 64 * len(rows) < 64


def test_text_has_defaults_and_a_seed(tmp_path):
    (tmp_path / "t.txt").write_text(TEXT * 20)
    rows = sequences(str(tmp_path / "t.txt"))
    assert np.array(rows).shape == (128, 512)
    assert rows == sequences(str(tmp_path / "t.txt"), seed=0) != sequences(str(tmp_path / "t.txt"), seed=1)
    assert len(sequences(str(tmp_path / "t.txt"), num_samples=3)) == 3


def test_a_short_text_is_one_short_sequence(tmp_path):
    (tmp_path / "t.txt").write_text("short")
    assert text_of(sequences(tmp_path / "t.txt")) == "short"


def test_a_large_text_is_never_held_whole(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("x" * 3_000_000)  # one line, too
    monkeypatch.setattr(documents, "PIECE", 1000)
    tracemalloc.start()
    rows = sequences(tmp_path / "t.txt", seq_len=100, num_samples=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array(rows).shape == (10, 100)
    assert peak < 1_000_000


def test_rows_of_json_lines_are_texts_or_token_ids(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "ab", "other": "zz"}, {"text": "cd"}, {"input_ids": [1, 2, 3]}, "ef"]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    assert sequences(path) == [[*b"ab\n\ncd", 1, 2, 3, *b"\n\nef"]]
    path.write_text(json.dumps({"text": "ab", "other": "zz", "ids": [7, 8]}))
    assert text_of(sequences(path, column="other")) == "zz"
    assert sequences(path, column="ids") == [[7, 8]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("3", "line 2 holds int"),
        ('{"title": "x"}', "line 2 has title, not text or input_ids"),
        ('{"text": 3}', "needed"),
        ('{"text": ["a"]}', "needed"),
        ('{"input_ids": [[1, 2]]}', "needed"),
        ('{"input_ids": [1.5]}', "needed"),
        ('{"input_ids": [true]}', "needed"),
        ('{"input_ids": [1, [2]]}', "not a row of token ids"),
        ('{"input_ids": [1267650600228229401496703205376]}', "needed|not a row"),
    ],
)
def test_bad_rows_are_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(InputError, match=message):
        sequences(path)


@pytest.mark.parametrize(
    "items",
    [
        ["ab", "cd"],
        [{"text": "ab"}, {"text": "cd", "more": 1}],
        iter(["ab", {"text": "cd"}]),
        ({"text": t} for t in ("ab", "cd")),
        Reader(["ab", "cd"]),
        Reader([{"text": "ab"}, {"text": "cd"}]),
    ],
)
def test_iterables_of_texts_are_packed(items):
    assert text_of(sequences(items)) == "ab\n\ncd"


def test_a_column_is_chosen_in_python_too():
    rows = [{"body": "ab", "input_ids": [1]}, {"body": "cd", "input_ids": [2, 3]}]
    assert text_of(sequences(rows, column="body")) == "ab\n\ncd"
    assert sequences(rows, column="input_ids") == [[1, 2, 3]]
    assert sequences(rows) == [[1], [2, 3]]


def test_a_data_loader_is_an_iterable_of_batches():
    loader = torch.utils.data.DataLoader(
        [{"input_ids": torch.tensor([i, i])} for i in range(5)], batch_size=2
    )
    assert sequences(loader) == [[i, i] for i in range(5)]
    assert sequences(loader, num_samples=3) == [[i, i] for i in range(3)]


def test_batches_are_limited_without_asking_for_more():
    asked = []

    def endless():
        while True:
            asked.append(1)
            yield {
                "input_ids": torch.ones(4, 6, dtype=torch.int64),
                "mask": torch.ones(4, 6),
                "use_cache": False,
            }

    batches = list(token_batches(qinvert.TokenData(data=endless(), num_samples=6)))
    assert [(len(b["input_ids"]), len(b["mask"]), b["use_cache"]) for b in batches] == [(4, 4, 0), (2, 2, 0)]
    assert len(asked) == 2


TOKENS = np.arange(60).reshape(6, 10)


def test_arrays_are_cut_and_sampled(tmp_path):
    np.savez(tmp_path / "t.npz", input_ids=TOKENS)
    for data in (TOKENS, torch.from_numpy(TOKENS), tmp_path / "t.npz"):
        assert sequences(data) == TOKENS.tolist()
        assert sequences(data, seq_len=5) == TOKENS.reshape(12, 5).tolist()
        assert sequences(data, seq_len=4)[:3] == [[0, 1, 2, 3], [4, 5, 6, 7], [10, 11, 12, 13]]
        two = sequences(data, num_samples=2, seed=3)
        assert two == sorted(two)
        assert all(row in TOKENS.tolist() for row in two)
        assert len({str(sequences(data, num_samples=2, seed=seed)) for seed in range(20)}) > 3
    assert sequences([[1, 2, 3, 4], [5, 6, 7]], seq_len=2) == [[1, 2], [3, 4], [5, 6]]


def test_what_seq_len_cannot_cut_is_refused():
    with pytest.raises(InputError, match="shorter than seq_len 11; pass 10 or less"):
        sequences(TOKENS, seq_len=11)
    with pytest.raises(InputError, match="cannot cut batches of input_ids, attention_mask"):
        sequences([{"input_ids": TOKENS, "attention_mask": TOKENS}], seq_len=5)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00a", b"\x89PNG\r\n\x1a\n\xd4"])
def test_a_file_that_is_no_text_is_refused(tmp_path, content):
    (tmp_path / "t.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"not UTF-8 text .* pass text, \.jsonl"):
        sequences(tmp_path / "t.bin")


@pytest.mark.parametrize("name", ["none.txt", "none.md", "none.jsonl", "none.npz"])
def test_a_missing_file_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="no such file"):
        sequences(tmp_path / name)


@pytest.mark.parametrize("content", ["", "\n"])
def test_a_file_without_tokens_is_refused(tmp_path, content):
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(InputError, match="no batches"):
        sequences(tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    "option",
    [{"num_samples": 0}, {"seq_len": 1.5}, {"seq_len": True}, {"seed": -1}, {"column": ""}, {"split": 3}],
)
def test_illegal_options_are_refused(option):
    with pytest.raises(InputError, match=f"{next(iter(option))} "):
        qinvert.TokenData(data=TOKENS, **option)


def test_options_without_data_are_refused():
    with pytest.raises(InputError, match="there is no data for num_samples"):
        qinvert.calibrate(torch.zeros(1, 8, 8), num_samples=3)


def test_datasets_are_read_by_name(monkeypatch, tmp_path):
    asked = []

    def load_dataset(name, configuration, split, streaming):
        if name == "missing":
            raise FileNotFoundError("no such dataset")
        asked.append((name, configuration, split, streaming))
        return iter([{"text": "ab"}, {"text": "cd"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert text_of(sequences("owner/name")) == "ab\n\ncd"
    assert text_of(sequences("owner/name:small", split="test")) == "ab\n\ncd"
    assert text_of(sequences(tmp_path)) == "ab\n\ncd"
    assert asked == [
        ("owner/name", None, "train", True),
        ("owner/name", "small", "test", True),
        (str(tmp_path), None, "train", True),
    ]
    with pytest.raises(InputError, match="cannot load split 'train' of the dataset 'missing'"):
        sequences("missing")
    with pytest.raises(InputError, match="dataset 'owner/name' has text, not body"):
        sequences("owner/name", column="body")


def test_datasets_are_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"'owner/name' is not a file.*pip install datasets"):
        sequences("owner/name")


def word_tokenizer(folder):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"[UNK]": 0, "hello": 1, "world": 2, "</s>": 3}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="[UNK]"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_the_model_s_own_tokenizer_is_found(tmp_path):
    tokenizer = word_tokenizer(tmp_path)
    documents, expected = ["hello world", "world"], [[1, 2, 3, 2]]
    # 256 tokens would be bytes if there were no tokenizer.
    for vocabulary in (4, 256):
        assert sequences(documents, Model(vocabulary, tmp_path)) == expected
    for given_tokenizer in (tokenizer, tmp_path, str(tmp_path)):
        assert sequences(documents, Model(), tokenizer=given_tokenizer) == expected
    assert sequences(documents, Model(), tokenizer=lambda text: [len(text)]) == [[11, 5]]


@pytest.mark.parametrize("vocabulary", [256, 257, 260])
def test_models_without_a_tokenizer_read_bytes(tmp_path, vocabulary):
    for folder in ("", tmp_path):
        assert find_tokenizer(Model(vocabulary, folder)) is BYTES


def test_a_model_that_has_none_needs_a_tokenizer(tmp_path):
    for model in (Model(255, tmp_path), Model(261), Model(None)):
        with pytest.raises(InputError, match=r"no tokenizer .* pass tokenizer="):
            sequences(["text"], model)
    with pytest.raises(InputError, match="needs a tokenizer"):
        list(token_batches(["text"]))
    # Token ids need none.
    assert sequences([{"ids": [1, 2]}], Model(300), column="ids") == [[1, 2]]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (3, "int is not a tokenizer"),
        (lambda _: "ids", "tokenizer returns"),
        (lambda _: [0.5], "tokenizer returns"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tokenizer, message):
    with pytest.raises(InputError, match=message):
        sequences(["text"], tokenizer=tokenizer)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="cannot load a tokenizer from"):
        sequences(["text"], tokenizer=tmp_path)
