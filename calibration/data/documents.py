"""Streams documents, text or token ids, from files, datasets and iterables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Final, TypeAlias

from qinvert.errors import InputError, MissingDependencyError, reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Token ids, and beside them what is to be predicted."""

    ids: Sequence[int]
    labels: Sequence[int]


#: Text, or token ids.
Piece: TypeAlias = str | Sequence[int] | Labelled
#: One document, in pieces.
Document: TypeAlias = Iterable[Piece]

#: Fields of a row that are tried, in this order, where none is named.
COLUMNS: Final = ("text", "input_ids")
#: Field that is 0 where token ids are padding.
MASK: Final = "attention_mask"
#: Field of what is to be predicted in the place of token ids.
LABELS: Final = "labels"
#: Characters of a text file that are held at once.
PIECE: Final = 1 << 16
#: Characters of a row of a .jsonl file: as many as a sequence that any model reads, many times over.
MAX_LINE: Final = 1 << 26


def file_documents(path: Path, column: str | None) -> Iterator[Document]:
    """Stream the rows of a .jsonl file, or any other file as one text, in pieces that end with a line.

    Raises
    ------
    InputError
        While streaming, if the file cannot be read or is not UTF-8, or if a
        line is not a row with the wanted field.
    """
    return _json_rows(path, column) if path.suffix == ".jsonl" else iter([_text(path)])


def dataset_documents(name: str, split: str, column: str | None) -> Iterator[Document]:
    """Stream the rows of a Hugging Face dataset, ``NAME`` or ``NAME:CONFIGURATION``.

    Raises
    ------
    InputError
        If there is no such dataset, split or field.
    MissingDependencyError
        If the package datasets is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            f"{name!r} is not a file, and loading a Hugging Face dataset of that name needs the package "
            "datasets, which is not installed; check the path, or run: pip install datasets"
        ) from None
    folder = Path(name).is_dir()
    path, _, configuration = (name, "", "") if folder else name.partition(":")
    try:
        rows = datasets.load_dataset(
            path, configuration or None, split=split, streaming=True, **_no_code(datasets.load_dataset)
        )
    except Exception as error:  # from FileNotFoundError to DatasetNotFoundError and ValueError
        raise InputError(
            f"cannot load split {split!r} of the dataset {name!r}: {reason(error)}; "
            "pass NAME or NAME:CONFIGURATION, a split that it has, or a file"
        ) from error
    return (row_document(row, column, f"dataset {name!r}") for row in rows)


def _no_code(load: Any) -> dict[str, bool]:
    """Options with which no script of a dataset is run; newer versions run none, and take no option."""
    name = "trust_remote_code"
    return {name: False} if name in signature(load).parameters else {}


def row_document(row: Any, column: str | None, where: str) -> Document:
    """Return a text, or the wanted field of a row, as a document.

    Raises
    ------
    InputError
        If the field is missing, or holds neither text nor token ids.
    """
    if isinstance(row, str):
        return (row,)
    if not isinstance(row, Mapping):
        raise InputError(
            f"{where} holds {type(row).__name__}; pass texts, or rows with a field {_or(column)}"
        )
    names = COLUMNS if column is None else (column,)
    found = next((name for name in names if row.get(name) is not None), None)
    if found is None:
        has = ", ".join(map(str, row)) or "nothing"
        raise InputError(f"{where} has {has}, not {_or(column)}; name the field with column=... (--column)")
    return (_attended(row[found], row, where),)


def _attended(piece: Any, row: Mapping[str, Any], where: str) -> Any:
    """Return token ids, and their labels, without padding: documents are packed, so that it is not needed."""
    if isinstance(piece, str):
        return piece
    mask, labels = (_beside(piece, row, name, where) for name in (MASK, LABELS))

    def real(values: Sequence[int]) -> Sequence[int]:
        return values if mask is None else [x for x, kept in zip(values, mask, strict=True) if kept]

    return real(piece) if labels is None else Labelled(ids=real(piece), labels=real(labels))


def _beside(piece: Any, row: Mapping[str, Any], name: str, where: str) -> Sequence[int] | None:
    """Return a field with a number for each token; a single number is the class of a row, and no label."""
    field: Any = row.get(name)
    if field is None or not hasattr(field, "__len__") or not hasattr(piece, "__len__"):
        return None
    if len(field) != len(piece):
        raise InputError(
            f"{where} has {len(piece)} token ids and {len(field)} numbers in {name}; pass one for each"
        )
    found: Sequence[int] = field
    return found


def _or(column: str | None) -> str:
    return " or ".join(COLUMNS) if column is None else column


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or reason(error)}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at the byte {error.object[error.start]:#04x}); "
            "pass text, .jsonl, or token ids in .npz or .safetensors"
        ) from None


def _text(path: Path) -> Iterator[str]:
    with _readable(path), path.open(encoding="utf-8-sig") as file:
        # A piece ends with a line, so that few words are cut; only a line without an end is cut.
        while piece := file.read(PIECE) + file.readline(PIECE):
            yield piece


def _json_rows(path: Path, column: str | None) -> Iterator[Document]:
    with _readable(path), path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), ""), start=1):
            if len(line) > MAX_LINE:
                raise InputError(
                    f"{path} line {number} has more than {MAX_LINE:,} characters; write one row to a line"
                )
            if line.strip():
                yield row_document(_row(line, path, number), column, f"{path} line {number}")


def _row(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} line {number} is not JSON ({reason(error)}); write one object per line, "
            'for example {"text": "..."}'
        ) from None
