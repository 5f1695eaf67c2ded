"""What the verbs share: output, progress, and where models and data come from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from qinvert import recall
from qinvert.calibration.sources import read_arrays
from qinvert.calibration.tokens import is_integer
from qinvert.checks import MAX_SEED, check_decibels
from qinvert.documents import to_document
from qinvert.errors import InputError
from qinvert.models import load_pretrained, require_transformers
from qinvert.plan import Plan


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


def data_options(function: F) -> F:
    """Add ``--data``, ``--sequences`` and ``--seed``."""
    options = (
        click.option(
            "--data", type=click.Path(), help="Token ids for a model, or matrices L (.npz, .safetensors)."
        ),
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
    for option in reversed(options):
        function = option(function)
    return function


def load_model(name: str) -> Any:
    """Load a local model folder, or the embedded one by its name ``recall``."""
    transformers = require_transformers()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return recall.load_model() if name == recall.NAME else load_pretrained(name)


def is_matrix_file(source: str) -> bool:
    """Whether ``source`` names a file of matrices rather than a model."""
    return Path(source).suffix in (".npz", ".safetensors")


def open_pair(source: str, data: str | None, sequences: int, seed: int) -> tuple[Any, Any]:
    """Return (source, data) for the library from what was typed.

    Raises
    ------
    InputError
        If a model comes without data, or matrices with data.
    """
    if is_matrix_file(source):
        if data is not None:
            raise InputError(f"{source} holds matrices already; leave out --data")
        return source, None
    if data is None:
        if source != recall.NAME:
            raise InputError(
                "a model needs --data FILE with token ids (.npz or .safetensors, array input_ids)"
            )
        return load_model(source), recall.sequences(sequences, seed)
    return load_model(source), data


def open_for_plan(
    plan: Plan, model: str | None, data: str | None, sequences: int, seed: int
) -> tuple[Any, Any]:
    """Return (source, data) for a verb that has a plan: the model it was made from is the default."""
    if data is not None and model is None and not holds_tokens(data):
        return data, None
    source = model if model is not None else plan.provenance.get("source")
    if not isinstance(source, str):
        raise InputError("the plan does not name its model; pass --model, or --data with matrices L")
    if model is None and is_matrix_file(source) and data is not None:
        raise InputError("the plan was made from matrices; pass --model for token ids")
    return open_pair(source, data, sequences, seed)


def holds_tokens(path: str) -> bool:
    """Whether a file holds token ids (integers) rather than matrices."""
    arrays = read_arrays(path)
    return "input_ids" in arrays or all(is_integer(array) for array in arrays.values())


def with_source(plan: Plan, source: str) -> Plan:
    """Return the plan with the model or file it was made from, so that other verbs find it."""
    return replace(plan, provenance={**plan.provenance, "source": printable(source)})


def printable(text: str) -> str:
    """Return ``text`` with escapes for what would steer a terminal or cannot be encoded."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def decibels(value: float) -> str:
    """``31.2``, or ``exact`` without an error."""
    return "exact" if value == math.inf else f"{value:.1f}"
