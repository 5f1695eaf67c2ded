import io
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qinvert.calibration.data.arrays import read_arrays
from qinvert.calibration.data.token_batches import token_batches
from qinvert.calibration.sources import DEFAULT_LAYER, open_source
from qinvert.errors import InputError
from qinvert.stress import stress_matrices

LOWER = stress_matrices("small_random", 4, 8)


class Reader:
    """As onnxruntime's calibration readers: get_next() until None."""

    def __init__(self, items):
        self.items = iter(items)

    def get_next(self):
        return next(self.items, None)


def collect(source, data=None):
    return [(name, tuple(lower.shape)) for name, lower in open_source(source, data)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (LOWER, [(DEFAULT_LAYER, (4, 8, 8))]),
        (LOWER.numpy(), [(DEFAULT_LAYER, (4, 8, 8))]),
        (LOWER[0], [(DEFAULT_LAYER, (8, 8))]),
        ({"a": LOWER, "b": LOWER[:2]}, [("a", (4, 8, 8)), ("b", (2, 8, 8))]),
        (iter([LOWER, LOWER]), [(DEFAULT_LAYER, (4, 8, 8))] * 2),
        ([{"a": LOWER}, {"b": LOWER}], [("a", (4, 8, 8)), ("b", (4, 8, 8))]),
        (Reader([{"a": LOWER}, {"a": LOWER[:1]}]), [("a", (4, 8, 8)), ("a", (1, 8, 8))]),
        (Reader([LOWER]), [(DEFAULT_LAYER, (4, 8, 8))]),
        (iter([("a", LOWER), ("b", (LOWER, LOWER.new_ones(4, 8)))]), [("a", (4, 8, 8)), ("b", (4, 8, 8))]),
    ],
)
def test_sources_stream_layers_and_matrices(source, expected):
    assert collect(source) == expected


def test_files_stream_one_layer_an_array(tmp_path):
    np.savez(tmp_path / "l.npz", a=LOWER.numpy(), b=LOWER[:1].numpy())
    save_file({"a": LOWER, "b": LOWER[:1].clone()}, tmp_path / "l.safetensors")
    expected = [("a", (4, 8, 8)), ("b", (1, 8, 8))]
    assert collect(tmp_path / "l.npz") == expected
    assert collect(str(tmp_path / "l.safetensors")) == expected


@pytest.mark.parametrize("source", [[], {}, iter([]), Reader([])])
def test_an_empty_source_is_an_error(source):
    with pytest.raises(InputError, match="no matrices"):
        collect(source)


@pytest.mark.parametrize("source", [3, None, object()])
def test_what_is_no_source_is_refused_with_the_legal_kinds(source):
    with pytest.raises(InputError, match=r"\.npz or \.safetensors"):
        collect(source)


def test_an_illegal_matrix_is_named_by_its_layer():
    bad = LOWER.clone()
    bad[0, 5, 1] = torch.nan
    with pytest.raises(InputError, match="'b' holds 1 NaN"):
        collect({"a": LOWER, "b": bad})


class Bomb:
    def __reduce__(self):
        return (print, ("a pickle was executed",))


def test_pickles_are_never_loaded(tmp_path, capsys):
    np.savez(tmp_path / "evil.npz", a=np.array([Bomb()], dtype=object))
    with pytest.raises(InputError, match="cannot read"):
        read_arrays(tmp_path / "evil.npz")
    assert "executed" not in capsys.readouterr().out


def truncated(path):
    np.savez(path, a=LOWER.numpy())
    path.write_bytes(path.read_bytes()[:-40])


def no_archive(path):
    path.write_bytes(b"not a zip at all")


def a_bare_array(path):
    with path.open("wb") as file:
        np.save(file, LOWER.numpy())


def a_lying_member(path):
    with zipfile.ZipFile(path, "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 10**9)}
        )
        archive.writestr("a.npy", header.getvalue())


@pytest.mark.parametrize("write", [truncated, no_archive, a_bare_array, a_lying_member])
def test_damaged_archives_are_input_errors(tmp_path, write):
    path = tmp_path / "bad.npz"
    write(path)
    with pytest.raises(InputError, match="cannot read"):
        read_arrays(path)


def test_damaged_safetensors_are_input_errors(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match="cannot read"):
        read_arrays(path)


@pytest.mark.parametrize("name", ["missing.npz", "matrices.csv"])
def test_missing_and_unknown_files_are_input_errors(tmp_path, name):
    if name.endswith("csv"):
        (tmp_path / name).write_text("1,2")
    with pytest.raises(InputError, match=r"\.npz or \.safetensors"):
        read_arrays(tmp_path / name)


TOKENS = torch.arange(12).reshape(3, 4)


@pytest.mark.parametrize(
    ("data", "shapes"),
    [
        (TOKENS, [(2, 4), (1, 4)]),
        (TOKENS.numpy(), [(2, 4), (1, 4)]),
        ([TOKENS, TOKENS[0]], [(3, 4), (1, 4)]),
        ([{"input_ids": TOKENS, "attention_mask": None}], [(3, 4)]),
        (Reader([{"input_ids": TOKENS}]), [(3, 4)]),
        ([[[1, 2, 3]]], [(1, 3)]),
    ],
)
def test_tokens_become_keyword_batches(data, shapes):
    assert [tuple(b["input_ids"].shape) for b in token_batches(data, batch_size=2)] == shapes


def test_token_files_name_their_array(tmp_path):
    np.savez(tmp_path / "t.npz", input_ids=TOKENS.numpy(), other=TOKENS.numpy())
    np.savez(tmp_path / "u.npz", a=TOKENS.numpy(), b=TOKENS.numpy())
    assert len(list(token_batches(tmp_path / "t.npz"))) == 1
    with pytest.raises(InputError, match="input_ids"):
        list(token_batches(tmp_path / "u.npz"))


@pytest.mark.parametrize("data", [[], torch.zeros(2, 3), [["a"]], 7, torch.zeros(0, 4, dtype=torch.int64)])
def test_what_are_no_tokens_is_refused(data):
    with pytest.raises(InputError, match="token"):
        list(token_batches(data))


def test_readers_may_return_arrays():
    lower = stress_matrices("small_random", 4, 8)
    batches = iter([lower[:2], lower[2:].numpy(), None, lower])

    class Reader:
        def get_next(self):
            return next(batches)

    assert [tuple(matrices.shape) for _, matrices in open_source(Reader())] == [(2, 8, 8), (2, 8, 8)]
    tokens = iter([np.ones((1, 4), dtype=np.int64), None])

    class TokenReader:
        def get_next(self):
            return next(tokens)

    assert [batch["input_ids"].shape for batch in token_batches(TokenReader())] == [(1, 4)]


def test_layers_of_safetensors_come_in_the_order_of_their_numbers(tmp_path):
    lower = stress_matrices("small_random", 2, 16)
    arrays = {
        f"layers.{i}": lower.to(torch.float32 if i % 2 else torch.float64, copy=True) for i in range(12)
    }
    save_file(arrays, tmp_path / "l.safetensors")
    assert [layer for layer, _ in open_source(tmp_path / "l.safetensors")] == list(arrays)


def test_headers_as_python_2_wrote_them_are_read_without_a_warning(tmp_path):
    lower = np.tril(np.ones((2, 4, 4), np.float32), -1)
    member = io.BytesIO()
    np.save(member, lower)
    # Python 2 wrote numbers of this size as long integers.
    header = member.getvalue()[: -lower.nbytes].replace(b"(2, 4, 4), }   ", b"(2L, 4L, 4L), }")
    path = tmp_path / "L.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header + lower.tobytes())
    with pytest.warns(UserWarning, match="Python 2"):
        np.load(path)["a"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_arrays(path)
    assert np.array_equal(found["a"], lower)
