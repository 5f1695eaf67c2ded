"""The options that say what data a model reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, Final, TypeVar, cast

import click

from qinvert.calibration.data.token_data import MAX_COUNT, NUM_SAMPLES, SEQ_LEN, TokenData
from qinvert.checks import MAX_SEED
from qinvert.errors import InputError
from qinvert.model_options import Device, Dtype

F = TypeVar("F", bound=Callable[..., Any])

#: Sequences that the embedded model's task generates where no data is given.
SEQUENCES: Final = 64
#: Options that say how text and token ids are read.
READING: Final = ("num_samples", "seq_len", "column", "split", "tokenizer")
#: Options that say how a model is loaded, the arguments of `qinvert.pretrained.Loading`.
LOADING: Final = ("device", "dtype", "device_map", "offload_folder")
#: All options of models and their data, but for the seed, which also draws matrices.
OF_MODELS: Final = (*READING, "sequences", *LOADING)
#: All options of data.
OF_DATA: Final = ("data", *READING, "sequences", "seed")
#: Every option here.
ALL: Final = (*OF_DATA, *LOADING)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """What ``--data`` and the options beside it say."""

    data: str | None = None
    sequences: int = SEQUENCES
    num_samples: int | None = None
    seq_len: int | None = None
    column: str | None = None
    split: str = "train"
    tokenizer: str | None = None
    seed: int = 0
    device: str = Device.CPU.value
    dtype: str = Dtype.FLOAT32.value
    device_map: str | None = None
    offload_folder: str | None = None

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `qinvert.pretrained.Loading`."""
        return {name: getattr(self, name) for name in LOADING}

    @property
    def tokens(self) -> TokenData:
        """Data for a model."""
        return TokenData(
            data=self.data,
            num_samples=self.num_samples,
            seq_len=self.seq_len,
            column=self.column,
            split=self.split,
            tokenizer=self.tokenizer,
            seed=self.seed,
        )

    def for_model(self, name: str) -> Any:
        """Return the data for a model; the embedded one makes its own where none is given.

        Raises
        ------
        InputError
            If another model comes without data, or an option would change nothing.
        """
        from qinvert import recall

        if self.data is not None:
            self.refuse(("sequences",), "--data is given, so that no sequences are generated")
            return self.tokens
        if name != recall.NAME:
            raise InputError(
                "a model needs --data FILE: text, .jsonl, token ids (.npz or .safetensors, array input_ids), "
                "or the name of a Hugging Face dataset"
            )
        self.refuse(READING, "there is no --data that would be read")
        return recall.sequences(self.sequences, self.seed)

    def refuse_without_model(self, why: str) -> None:
        """Refuse all options of models and their data where no model runs.

        Raises
        ------
        InputError
            With the options that were given, and ``why`` they would change nothing.
        """
        self.refuse(OF_MODELS, why)

    def refuse(self, names: Iterable[str], why: str) -> None:
        """Refuse options that would change nothing; ``why`` says so of the whole call.

        Raises
        ------
        InputError
            If one of them is not what it is by default.
        """
        usual = {field.name: field.default for field in fields(self)}
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != usual[name]]
        if given:
            raise InputError(f"{why}; leave out {', '.join(given)}")


def data_options(function: F) -> F:
    """Add ``--data`` and what goes with it, passed as ``given``."""

    @wraps(function)
    def bundled(*arguments: Any, **options: Any) -> Any:
        given = DataOptions(**{field.name: options.pop(field.name) for field in fields(DataOptions)})
        return function(*arguments, given=given, **options)

    for option in reversed(_DATA_OPTIONS):
        bundled = option(bundled)
    return cast("F", bundled)


_DATA_OPTIONS = (
    click.option(
        "--data",
        help="Data for the model: text, .jsonl, token ids (.npz, .safetensors) or a Hugging Face dataset, "
        "NAME or NAME:CONFIGURATION.",
    ),
    click.option(
        "--num-samples",
        type=click.IntRange(1, MAX_COUNT),
        help=f"Sequences to draw from --data; by default {NUM_SAMPLES} of text, and all token ids.",
    ),
    click.option(
        "--seq-len",
        type=click.IntRange(1, MAX_COUNT),
        help=f"Tokens per sequence; by default {SEQ_LEN} for text, and the given length for token ids.",
    ),
    click.option("--column", help="Field of .jsonl or dataset rows; by default text, or else input_ids."),
    click.option("--split", default="train", show_default=True, help="Split of a Hugging Face dataset."),
    click.option("--tokenizer", help="Folder of a tokenizer for text; the model's own by default."),
    click.option(
        "--sequences",
        default=SEQUENCES,
        show_default=True,
        type=click.IntRange(1, 100_000),
        help="Sequences that the recall task generates without --data.",
    ),
    click.option(
        "--seed",
        default=0,
        show_default=True,
        type=click.IntRange(0, MAX_SEED),
        help="Seed of generated data and of samples.",
    ),
    click.option(
        "--device",
        default=Device.CPU.value,
        show_default=True,
        type=click.Choice([device.value for device in Device]),
        help="Where the model runs; under torchrun every process takes its own card.",
    ),
    click.option(
        "--dtype",
        default=Dtype.FLOAT32.value,
        show_default=True,
        type=click.Choice([dtype.value for dtype in Dtype]),
        help="Type of the weights; auto is that of the model's files.",
    ),
    click.option(
        "--device-map",
        type=click.Choice(("auto",)),
        help="Spread the layers over cards, memory and disk (needs accelerate), in the place of --device.",
    ),
    click.option(
        "--offload-folder",
        type=click.Path(file_okay=False),
        help="Folder for weights that --device-map puts on the disk.",
    ),
)
