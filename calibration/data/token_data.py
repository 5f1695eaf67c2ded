"""How a model is to read its data: what a caller says beside the data itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from qinvert.checks import MAX_SEED, check_integer
from qinvert.errors import InputError

#: Tokens in a sequence that is cut from text.
SEQ_LEN: Final = 512
#: Sequences that are drawn from text.
NUM_SAMPLES: Final = 128
#: No tensor of token ids is larger along an axis.
MAX_COUNT: Final = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenData:
    """Data for a model, and how to read it; it may be passed wherever ``data`` may.

    What ``data`` may be is listed at `qinvert.calibration.data.token_batches.token_batches`.

    Raises
    ------
    InputError
        If an option is not legal.
    """

    data: Any
    #: Read at most this many sequences; by default `NUM_SAMPLES` of text, and all token ids.
    num_samples: int | None = None
    #: Tokens per sequence; by default `SEQ_LEN` for text, and the given length for token ids.
    seq_len: int | None = None
    #: Field of a row that holds text or token ids; by default ``"text"``, or else
    #: ``"input_ids"``.
    column: str | None = None
    #: Split of a Hugging Face dataset.
    split: str = "train"
    #: A tokenizer of transformers, its folder, or a callable from text to token ids; the model's by default.
    tokenizer: Any = None
    #: Seed of the choice of sequences.
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_samples", "seq_len"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1, MAX_COUNT, InputError)
        check_integer("seed", self.seed, 0, MAX_SEED, InputError)
        for name in ("column", "split"):
            value = getattr(self, name)
            if not isinstance(value, str | None) or value == "":
                raise InputError(f"{name} {value!r} is not a name; pass for example {name}='text'")


def with_options(data: Any, num_samples: int | None, seq_len: int | None, seed: int = 0) -> Any:
    """Return ``data`` with the options that are not None; a `TokenData` keeps its own seed.

    Raises
    ------
    InputError
        If an option is not legal, or comes without data.
    """
    options = {"num_samples": num_samples, "seq_len": seq_len}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if data is None:
        if given:
            raise InputError(
                f"there is no data for {' and '.join(given)}; pass text or token ids as data=... (--data), "
                "or leave this out"
            )
        return None
    if isinstance(data, TokenData):
        return replace(data, **given)
    return TokenData(data=data, **given, seed=seed)
