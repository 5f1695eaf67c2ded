"""Runs the examples of a page in the order in which they stand: Python, and the command line."""

import re
import shlex
from dataclasses import dataclass, field

import pytest
from click.testing import CliRunner
from pages import ROOT

from qinvert.cli.app import cli
from qinvert.export.runtimes import RUNTIMES, installed

#: Blocks that stand at the left edge; those inside lists and directives are not run.
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w])")
#: Commands that install or say where something is installed.
NOT_RUN = ("python -m venv ", "export QINVERT_")


@dataclass
class Session:
    """What a page has run so far."""

    names: dict = field(default_factory=dict)
    #: Runtimes that its commands need and that are not installed here.
    missing: set = field(default_factory=set)

    def run(self, kind, text):
        if kind == "python":
            exec(compile(text, "page", "exec"), self.names)
            return
        for command, expected in commands(text):
            self.command(command, expected)

    def command(self, command, expected):
        if command.startswith(NOT_RUN):
            return
        program, *arguments = shlex.split(command)
        assert program == "qinvert", command
        asked = {arguments[i + 1] for i, word in enumerate(arguments) if word == "--runtime"}
        assert asked <= {*RUNTIMES}, command
        lacking = asked - {*installed()}
        if lacking:
            self.missing |= lacking
            return
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, (command, result.output)
        assert matches(expected, result.stdout), (command, expected, result.stdout)


def commands(text):
    """Each command of a block with the lines that it shows."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
    assert not parts[0].strip(), text
    for part in parts[1:]:
        command, _, expected = part.partition("\n")
        yield command, expected


def matches(expected, found):
    """Whether text is as a page shows it: `...` stands for any text, and numbers may be a tenth off."""
    pieces = [" ".join(piece.split()) for piece in expected.split("...")]
    match = re.search(".*?".join(_pattern(piece) for piece in pieces), " ".join(found.split()))
    if match is None:
        return False
    shown = [_value(number) for piece in pieces for number in NUMBER.findall(piece)]
    return [_value(number) for number in match.groups()] == pytest.approx(shown, rel=0.1, abs=1)


def _pattern(piece):
    """A pattern of the text, with one group for each number."""
    texts = [re.escape(text) for text in NUMBER.split(piece)]
    return f"({NUMBER.pattern})".join(texts)


def _value(number):
    return float(number.replace(",", ""))


def blocks(page):
    """Kind and text of each example of a page."""
    return BLOCK.findall((ROOT / page).read_text())


def run_page(page, folder, monkeypatch):
    """Run all examples of a page in one folder."""
    monkeypatch.chdir(folder)
    session = Session()
    for kind, text in blocks(page):
        session.run(kind, text)
    return session
