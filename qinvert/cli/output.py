"""What verbs print: lines, tables, JSON and progress."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from qinvert.cli.tables import Table, drawings, paragraph
from qinvert.documents import to_document
from qinvert.progress import listening

if TYPE_CHECKING:
    from rich.console import Console

#: Characters of a line where tables go into a file or a pipe.
FILE_WIDTH: Final = 160

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How a verb prints: results on stdout, progress on stderr."""

    as_json: bool
    quiet: bool

    def say(self, text: str) -> None:
        """Print one line for people."""
        if not self.as_json and not self.quiet:
            click.echo(_fitted(printable(text)))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table for people, in blocks that fit; numbers are aligned on the right."""
        if self.as_json or self.quiet:
            return
        console = _console()
        # Rich itself would leave with 1.
        setattr(console, "on_broken_pipe", _raise)  # noqa: B010 - a method of theirs
        shown = Table(
            title=printable(title),
            columns=tuple(columns),
            rows=tuple(tuple(printable(cell) for cell in row) for row in rows),
        )
        for drawing in drawings(shown, console.width):
            console.print(drawing)

    def result(self, document: dict[str, Any]) -> None:
        """Print the machine-readable result."""
        if self.as_json:
            click.echo(json.dumps(to_document(document), indent=1, allow_nan=False))

    @contextmanager
    def progress(self, label: str) -> Iterator[Callable[[str, int], None]]:
        """Show on stderr what a library call does, with totals and the time that remains where known."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TaskID,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        if self.as_json or self.quiet or not console.is_terminal:
            yield lambda _name, _count: None
            return
        text = TextColumn("{task.description}")
        columns = (SpinnerColumn(), text, BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task, parts = bar.add_task(label, total=None), dict[str, TaskID]()

            def show(what: str, done: int, total: int) -> None:
                if what not in parts:
                    parts[what] = bar.add_task(what)
                bar.update(parts[what], completed=done, total=total)

            with listening(show):
                yield lambda name, count: bar.update(task, description=f"{label}: {name} {count}")


def _console() -> Console:
    """Return where tables go: a terminal of any width, or a file, where a fixed width keeps them whole."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def _fitted(text: str) -> str:
    """Wrap a line between words for a terminal; files and pipes get it as it is."""
    console = _console()
    if not console.is_terminal:
        return text
    return "\n".join(paragraph(line, console.width) for line in text.split("\n"))


def present(*paths: str | PathLike[str]) -> set[str]:
    """Return those of the paths that exist, and of folders what is in them."""
    found = [Path(path) for path in paths]
    inside = [file for path in found if path.is_dir() for file in path.iterdir()]
    return {str(path) for path in (*found, *inside) if path.exists()}


def wrote(path: str, before: set[str]) -> str:
    """Say that a file was written, and whether it took the place of another, which `present` found before."""
    return f"{'replaced' if str(Path(path)) in before else 'wrote'} {path}"


def _raise() -> None:
    """Raise what is being handled."""
    raise


def output_options(function: F) -> F:
    """Add ``--json`` and ``--quiet``."""
    function = click.option("--quiet", is_flag=True, help="Print errors only.")(function)
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)


def printable(text: str) -> str:
    """Return ``text`` with escapes for what would steer a terminal or cannot be encoded."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
