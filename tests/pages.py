"""The hand-written pages of the project, cut into sections, tables and code blocks."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page(name):
    return (ROOT / "docs" / name).read_text()


def sections(text):
    """Text of every section by its heading, of any level; what stands in a code block is no heading."""
    plain = FENCED.sub(lambda block: re.sub("^", "    ", block[0], flags=re.MULTILINE), text)
    parts = re.split(r"^#+ (.*)\n", plain, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text):
    """Cells of the only table in a text, by the names of its columns."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    titles, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(titles, cells, strict=True)) for cells in body]


def code(text, language):
    """Code blocks of one language, as they stand in a page or indented in a section of it."""
    blocks = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text, flags=re.MULTILINE | re.DOTALL)
    return [
        re.sub(f"^{indent}", "", body, flags=re.MULTILINE)
        for indent, kind, body in blocks
        if kind == language
    ]


def quoted(text):
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)
