"""A figure of a page: the drawing, words for those who do not see it, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Numbers with headers; the first cell of every row is its header."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure."""

    #: Unique on the page.
    ident: str
    title: str
    #: How to read it.
    says: str
    #: What it shows.
    alternative: str
    svg: str
    #: The numbers behind it.
    table: Table
    #: Whether it needs the whole width of the page.
    wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Figures and tables that answer one question."""

    #: Unique on the page.
    ident: str
    title: str
    #: Why one should look, in a sentence or two.
    intro: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    #: What is not shown, and what would show it.
    lacks: tuple[str, ...] = ()


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of texts."""
    return Table(caption=caption, columns=tuple(columns), rows=tuple(tuple(row) for row in rows))
