"""Tables that fit the terminal: which columns stand in which block, and how wide each one is."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from rich.table import Table as RichTable

#: Characters that a column adds to its text: a blank on both sides, and a line.
FRAME: Final = 3
#: Words in a cell wrap where they would take more characters than this, if there is no room.
PROSE: Final = 26
#: What stands in columns of numbers, which are aligned on the right.
NUMERIC: Final = re.compile(r"[-+<>≤]?\.?\d|(-|exact|none|inf|nan)?$")
#: Lines that the words of a heading may take.
HEADING_LINES: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Columns that stand side by side: their numbers in the table, and the characters of each."""

    columns: tuple[int, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of text; its first column names the rows, and every block repeats it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def shortened(self) -> Table:
        """Move the common beginning of dotted names, as layers have them, into the title."""
        prefix = common_prefix([row[0] for row in self.rows])
        if not prefix:
            return self
        rows = tuple((row[0].removeprefix(prefix), *row[1:]) for row in self.rows)
        return Table(
            title=f"{self.title}; each {self.columns[0]} is {prefix}*", columns=self.columns, rows=rows
        )

    def blocks(self, width: int) -> list[Block]:
        """Return blocks of at most ``width`` characters that together hold every column."""
        fewest = [self._fewest(i, width) for i in range(len(self.columns))]
        found: list[list[int]] = [[0]]
        for i in range(1, len(self.columns)):
            taken = sum(fewest[j] + FRAME for j in (*found[-1], i)) + 1
            if taken > width and len(found[-1]) > 1:
                found.append([0])
            found[-1].append(i)
        return [self._widened(columns, fewest, width) for columns in found]

    def of_numbers(self, column: int) -> bool:
        """Whether every cell of a column begins with a number, or stands for one that is not known."""
        return all(NUMERIC.match(cell) for cell in self._cells(column))

    def _cells(self, column: int) -> list[str]:
        return [row[column] for row in self.rows]

    def _fewest(self, column: int, width: int) -> int:
        """Return the characters that a column needs: no number breaks, and words wrap where they are many."""
        longest = max(map(len, self._cells(column)), default=0)
        if column == 0:
            # A name that takes the room of everything else is the only text that may be broken.
            wanted = min(longest, width // 2)
        else:
            wanted = max(_longest_word(self._cells(column)), min(longest, PROSE))
        return min(max(wanted, heading_width(self.columns[column])), width - 2 * FRAME - 1)

    def _widened(self, columns: Sequence[int], fewest: Sequence[int], width: int) -> Block:
        """Give the room that a block leaves to the cells whose words would wrap, and then to headings."""
        widths = [fewest[i] for i in columns]
        spare = width - 1 - sum(w + FRAME for w in widths)
        cells = [max(map(len, self._cells(i)), default=0) for i in columns]
        headings = [min(len(self.columns[i]), PROSE) for i in columns]
        for wanted in (cells, headings):
            for place, most in enumerate(wanted):
                more = max(0, min(spare, most - widths[place]))
                widths[place] += more
                spare -= more
        return Block(columns=tuple(columns), widths=tuple(widths))


def common_prefix(names: Sequence[str]) -> str:
    """Return what two or more dotted names begin with, up to a point: ``model.layers.``."""
    if len(set(names)) < 2:
        return ""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{first}." for first, *_ in takewhile(lambda part: len(set(part)) == 1, parts))


def heading_width(heading: str) -> int:
    """Return the fewest characters that show a heading in `HEADING_LINES` lines of whole words."""
    width = _longest_word([heading])
    while len(wrapped(heading, width)) > HEADING_LINES:
        width += 1
    return width


def wrapped(text: str, width: int) -> list[str]:
    """Return lines of whole words; a word that is longer than a line stands by itself."""
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False) or [""]


def paragraph(text: str, width: int) -> str:
    """Return text in lines of at most ``width`` characters; further lines are indented by two more."""
    if len(text) <= width:
        return text
    lead = text[: len(text) - len(text.lstrip())]
    lines = textwrap.wrap(
        text, width, subsequent_indent=f"{lead}  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


def drawings(table: Table, width: int) -> Iterator[RichTable]:
    """Yield the blocks of a table as rich draws them."""
    short = table.shortened()
    for number, block in enumerate(short.blocks(width)):
        yield _drawn(short, block, f"{short.title}{', continued' if number else ''}", width)


def _drawn(table: Table, block: Block, title: str, width: int) -> RichTable:
    from rich.table import Table as RichTable
    from rich.text import Text

    # Text, not str: names may hold what rich takes for markup.
    drawn = RichTable(title_justify="left", title_style="bold")
    drawn.title = Text("\n".join(wrapped(title, width)))
    for i, characters in zip(block.columns, block.widths, strict=True):
        heading = Text("\n".join(wrapped(table.columns[i], characters)))
        side: Literal["left", "right"] = "right" if i and table.of_numbers(i) else "left"
        drawn.add_column(heading, justify=side, width=characters, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(row[i]) for i in block.columns))
    return drawn


def _longest_word(texts: Sequence[str]) -> int:
    return max((len(word) for text in texts for word in text.split()), default=1)
