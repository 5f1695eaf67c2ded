"""What the verbs share: output, progress, and where models and data come from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from qinvert import recall
from qinvert.calibration.data.token_batches import holds_tokens
from qinvert.calibration.data.token_data import MAX_COUNT, NUM_SAMPLES, SEQ_LEN, TokenData, with_options
from qinvert.checks import MAX_SEED, check_decibels
from qinvert.documents import to_document
from qinvert.errors import InputError
from qinvert.plan.plan import Plan
from qinvert.pretrained import load_pretrained, require_transformers


class Decibels(click.ParamType[float]):
    """A finite number: NaN would pass every comparison."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return check_decibels(param.opts[-1] if param else "goal", float(value), InputError)
        except ValueError as error:
            self.fail(str(error), param, ctx)


#: Type of options that are goals in dB.
DECIBELS = Decibels()


F = TypeVar("F", bound=Callable[..., Any])

#: Sequences that the embedded model's task generates where no data is given.
SEQUENCES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How a verb talks: results on stdout, progress on stderr."""

    as_json: bool
    quiet: bool

    def say(self, text: str) -> None:
        """Print one line for people."""
        if not self.as_json and not self.quiet:
            click.echo(printable(text))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table for people; the first column is left-aligned, the others right."""
        if self.as_json or self.quiet:
            return
        # Text, not str: names may hold what rich takes for markup.
        table = Table(title=Text(printable(title)), title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        # Not a terminal: a fixed width keeps tables whole in files and logs.
        console = Console()
        if not console.is_terminal:
            console = Console(width=160)
        console.print(table)

    def result(self, document: dict[str, Any]) -> None:
        """Print the machine-readable result."""
        if self.as_json:
            click.echo(json.dumps(to_document(document), indent=1, allow_nan=False))

    @contextmanager
    def progress(self, label: str) -> Iterator[Callable[[str, int], None]]:
        """Show a spinner with counts on stderr while a library call runs."""
        console = Console(stderr=True)
        if self.as_json or self.quiet or not console.is_terminal:
            yield lambda _name, _count: None
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(label)
            yield lambda name, count: bar.update(task, description=f"{label}: {name} {count}")


def output_options(function: F) -> F:
    """Add ``--json`` and ``--quiet``."""
    function = click.option("--quiet", is_flag=True, help="Print errors only.")(function)
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)


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
            If another model comes without data.
        """
        if self.data is not None:
            return self.tokens
        if name != recall.NAME:
            raise InputError(
                "a model needs --data FILE: text, .jsonl, token ids (.npz or .safetensors, array input_ids), "
                "or the name of a Hugging Face dataset"
            )
        self.check_unused()
        return recall.sequences(self.sequences, self.seed)

    def check_unused(self) -> None:
        """Refuse options of text and token ids where there are none."""
        with_options(None, self.num_samples, self.seq_len)


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
        help="For a model: text, .jsonl, token ids (.npz, .safetensors) or a Hugging Face dataset, "
        "NAME or NAME:CONFIGURATION. Or matrices L (.npz, .safetensors).",
    ),
    click.option(
        "--num-samples",
        type=click.IntRange(1, MAX_COUNT),
        help=f"Sequences to draw from --data; {NUM_SAMPLES} of text, all token ids by default.",
    ),
    click.option(
        "--seq-len",
        type=click.IntRange(1, MAX_COUNT),
        help=f"Tokens in a sequence; {SEQ_LEN} of text, as they are in token ids by default.",
    ),
    click.option("--column", help="Field of .jsonl or dataset rows; text, or else input_ids, by default."),
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
        help="Of generated data and samples.",
    ),
)


def load_model(name: str) -> Any:
    """Load a local model folder, or the embedded one by its name ``recall``."""
    transformers = require_transformers()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return recall.load_model() if name == recall.NAME else load_pretrained(name)


def is_matrix_file(source: str) -> bool:
    """Whether ``source`` names a file of matrices rather than a model."""
    return Path(source).suffix in (".npz", ".safetensors")


def open_pair(source: str, given: DataOptions) -> tuple[Any, Any]:
    """Return (source, data) for the library from what was typed.

    Raises
    ------
    InputError
        If a model comes without data, or matrices with data.
    """
    if is_matrix_file(source):
        if given.data is not None:
            raise InputError(f"{source} holds matrices already; leave out --data")
        given.check_unused()
        return source, None
    data = given.for_model(source)
    return load_model(source), data


def open_for_plan(plan: Plan, model: str | None, given: DataOptions) -> tuple[Any, Any]:
    """Return (source, data) for a verb that has a plan: the model it was made from is the default."""
    if given.data is not None and model is None and not holds_tokens(given.data):
        given.check_unused()
        return given.data, None
    source = model if model is not None else plan.provenance.get("source")
    if not isinstance(source, str):
        raise InputError("the plan does not name its model; pass --model, or --data with matrices L")
    if model is None and is_matrix_file(source) and given.data is not None:
        raise InputError("the plan was made from matrices; pass --model for text or token ids")
    return open_pair(source, given)


def with_source(plan: Plan, source: str) -> Plan:
    """Return the plan with the model or file it was made from, so that other verbs find it."""
    return replace(plan, provenance={**plan.provenance, "source": printable(source)})


def printable(text: str) -> str:
    """Return ``text`` with escapes for what would steer a terminal or cannot be encoded."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def decibels(value: float) -> str:
    """``31.2``, or ``exact`` without an error."""
    return "exact" if value == math.inf else f"{value:.1f}"
