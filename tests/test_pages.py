"""The hand-written pages: what they link to, name and draw is there."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from runpy import run_path

import pytest
from pages import FENCED, ROOT, code, page, quoted, rows, sections

from qinvert.errors import MissingDependencyError
from qinvert.program.ports import Meaning
from qinvert.program.serialization import OPERATIONS

PAGES = [
    "README.md",
    "CHANGELOG.md",
    *(str(f.relative_to(ROOT)) for f in sorted((ROOT / "docs").rglob("*.md")) if "tables" not in f.parts),
]
#: Where a path may start.
HOMES = ("", "qinvert", "calibration", "calibration/planning", "export", "export/verification", "docs")
TERMS = {
    *("M", "L", "K", "S", "T", "W", "beta", "decay", "chunk", "head", "layer"),
    *("program", "port", "step", "block", "tile", "merge", "base", "level", "residual term", "correction"),
    *("support", "format", "stored type", "scale", "zero point", "grid", "quantize", "saturate"),
    *("accumulator", "plane", "requantize", "divide", "multiplier", "identity", "signal", "noise", "sqnr"),
    *(
        "floor",
        "loss",
        "range",
        "growth",
        "room",
        "headroom",
        "group",
        "candidate",
        "ladder",
        "plan",
        "entry",
    ),
    *("profile", "target", "lowering", "runtime", "interval", "proof"),
}


def prose(name):
    """The text of a page without its code blocks."""
    return FENCED.sub("", (ROOT / name).read_text())


def anchors(name):
    """What the headings of a page are called in links."""
    titles = re.findall(r"^#+ (.*)$", prose(name), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (ROOT / name).parent / file if file else ROOT / name
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.resolve().relative_to(ROOT)), target


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name):
    for path in re.findall(r"`([\w./-]+\.(?:py|md|npz))`", prose(name)):
        if "/" in path or path.endswith(".py"):
            found = [home for home in HOMES if (ROOT / home / path).exists()]
            assert found or path in ("qinvert/methods/four_terms.py",), path


def resolved(name):
    """What a dotted name stands for: a module, or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = import_module(".".join(parts[:count]))
        except MissingDependencyError:
            return None  # The module is there; what it needs is not installed.
        except ModuleNotFoundError:
            continue
        # Another checkout that is installed here may have modules that this one has not.
        assert ROOT in Path(value.__file__).parents, name
        for attribute in parts[count:]:
            value = getattr(value, attribute)
        return value
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", PAGES)
def test_modules_and_names_that_are_named_exist(name):
    text = sections(prose(name))
    # The old paths of a release that was never published.
    text.pop("Module paths that moved", None)
    # Keys of graphs look like names of modules.
    keys = r"qinvert\.(?:input|output|version|profile|plan_sha256|layer|program|requantize|chains|session)\w*"
    for dotted in re.findall(r"`(qinvert(?:\.\w+)+)", "\n".join(text.values())):
        if not re.fullmatch(keys, dotted) or dotted in ("qinvert.program", "qinvert.export"):
            resolved(dotted)


def test_paths_that_moved_are_where_the_changelog_says():
    moved = rows(sections(prose("CHANGELOG.md"))["Module paths that moved"])
    for row in moved:
        for name in quoted(row["is"]):
            resolved(name)
        old = quoted(row["was"])[0].split(".")
        home = ROOT.joinpath(*old[: 3 if old[1] in ("calibration", "export") else 2])
        assert not home.exists(), old
        assert not home.with_suffix(".py").exists(), old


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def unknown_numbers(row, text):
    """Cycles and ratios of a row of results that do not stand in the page that it names."""
    found = re.findall(r"\d[\d.,]*k(?= cycles| on)|\d+\.\d(?=,| and| times)", row["result"])
    assert found, row["question"]
    return [number for number in found if not re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d.])", text)]


def test_the_results_of_the_readme_are_those_of_the_pages_that_it_names():
    results = [
        row for row in rows(sections(prose("README.md"))["What was measured"]) if "cycles" in row["result"]
    ]
    assert len(results) == 3
    for row in results:
        (page_,) = re.findall(r"\((docs/[a-z]+\.md)\)", row["where it comes from"])
        text = (ROOT / page_).read_text()
        assert not unknown_numbers(row, text), row["question"]
        wrong = {**row, "result": row["result"].replace("k cycles", "7k cycles")}
        assert unknown_numbers(wrong, text)


def test_the_script_of_the_readme_runs_as_pasted(tmp_path, monkeypatch, capsys):
    (script,) = code((ROOT / "README.md").read_text(), "python")
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    assert (tmp_path / "inverse.onnx").is_file()
    shown = capsys.readouterr().out
    assert "onnxruntime (optimized)" in shown
    # Each of 8 matrices has 64 x 64 values.
    assert shown.count(f" of {8 * 64 * 64} values differ") == 2


def test_the_picture_of_the_readme_is_the_one_that_its_script_draws():
    assert (ROOT / "docs" / "layer.svg").read_text() == run_path(str(ROOT / "docs" / "picture.py"))[
        "picture"
    ]()


def test_the_glossary_says_each_word_once():
    found = [
        term
        for line in page("glossary.md").splitlines()
        if line.startswith("* **")
        for term in re.findall(r"\*\*(.+?)\*\*", line)
    ]
    assert len(found) == len(set(found))
    assert set(found) >= TERMS
    for word in ("Carried", "Widened"):
        assert f"*{word}*" in page("glossary.md")


ARCHITECTURE = sections(page("architecture.md"))


#: What lies in the lowest package's folder, and above it.
ABOVE = ("calibration", "plot", "report_page", "export", "cli")


def room(name):
    """The modules of a room or of a single module of the drawing, as parsed files."""
    found = [ROOT / home / name for home in ("", "qinvert", "calibration", "export")]
    (place,) = [path for path in found if path.is_dir() and not path.is_symlink()] or [
        path.with_suffix(".py") for path in found if path.with_suffix(".py").exists()
    ]
    links = tuple(f"qinvert/{above}/" for above in ABOVE)
    files = [place] if place.suffix else place.rglob("*.py")
    return place, [f for f in files if not str(f.relative_to(ROOT)).startswith(links) or name in ABOVE]


def dotted(place):
    """The name of a package or module."""
    parts = place.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "qinvert" else ("qinvert", *parts))


def imports(files):
    """What modules import while they are loaded."""
    for file in files:
        if file == ROOT / "qinvert" / "__init__.py":
            continue  # It only names what lives above it.
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                yield node.module


def uses(user, used):
    name, (_, files) = dotted(room(used)[0]), room(user)
    # All packages lie in the lowest one: only what does not lie in a higher one counts.
    higher = tuple(f"qinvert.{name}" for name in ABOVE) if used == "qinvert" else ()
    return any(
        f"{module}.".startswith(f"{name}.") and not module.startswith(higher or "-")
        for module in imports(files)
    )


def arrows():
    (drawing,) = code(page("architecture.md"), "mermaid")
    for line in drawing.splitlines():
        names = [name.strip() for name in line.split("-->")]
        yield from pairwise(names)


@pytest.mark.parametrize(("used", "user"), list(arrows()))
def test_every_arrow_of_the_drawing_is_an_import_and_none_goes_back(used, user):
    assert uses(user, used)
    assert not uses(used, user)


def test_the_table_of_rooms_names_every_package():
    named = {quoted(row["room"])[0] for row in rows(ARCHITECTURE["Layers and rooms"])}
    folders = {
        str(file.parent.relative_to(ROOT))
        for home in ("qinvert", "calibration", "export")
        for file in (ROOT / home).glob("*/__init__.py")
    }
    folders |= {"calibration", "export"}
    inner = {path for path in folders if path.startswith(("calibration/", "export/"))}
    assert named == folders - inner - {"qinvert/calibration", "qinvert/export", "qinvert/assets"}
    for path in inner:
        assert f"`{path.partition('/')[2]}`" in ARCHITECTURE["Layers and rooms"], path


def test_the_tables_of_steps_and_meanings_are_those_of_the_code():
    kinds = rows(ARCHITECTURE["Steps and their interpreters"].partition("\n\n`Program.evaluate")[0])
    assert [quoted(row["step"])[0] for row in kinds] == [kind.__name__ for kind in OPERATIONS.values()]
    assert [quoted(row["meaning"])[0] for row in rows(ARCHITECTURE["Ports"])] == list(Meaning)


def test_those_who_ask_what_a_product_means_are_listed():
    asking = set()
    for home in ("qinvert", "calibration", "export"):
        for file in (ROOT / home).rglob("*.py"):
            path = str(file.relative_to(ROOT))
            if not path.startswith(("qinvert/calibration", "qinvert/export")) and re.search(
                r"plan\.products\b|import .*\b(integer_product|plane_pairs)\b", file.read_text()
            ):
                asking.add(path.removeprefix("qinvert/"))
    told = re.search(r"^Who asks:.*?\n\n", page("architecture.md"), re.MULTILINE | re.DOTALL)[0]
    assert asking == set(quoted(told)) - {"IntegerProduct"}


WRITTEN = {
    "docs/tables.py": "docs/accuracy.md",
    "docs/runtimes.py": "docs/runtimes.md",
    "benchmarks/page.py": "docs/benchmarks.md",
    "benchmarks/npu_page.py": "docs/npu.md",
}


@pytest.mark.parametrize("script", WRITTEN)
def test_the_words_of_a_page_that_a_script_writes_are_those_of_the_script(script):
    # Numbers are measured anew by the script alone; words may change in both at once.
    text, templates = (ROOT / WRITTEN[script]).read_text(), []
    for node in ast.parse((ROOT / script).read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            value = node.value.value
            templates += [value] if isinstance(value, str) and "\n" in value else []
    assert templates
    for template in templates:
        for part in re.split(r"\{[^}]*\}", template):
            assert part.strip() in text


def test_the_examples_of_chunk_steps_run(capsys):
    pytest.importorskip("transformers")
    blocks = code(page("chunk-step.md"), "python")
    assert len(blocks) == 4
    # One after the other, as a reader types them.
    exec("\n".join(blocks), {})
    text = capsys.readouterr().out
    assert "['q', 'k', 'v', 'beta', 'g', 'state']" in text
    assert "free-running" in text


def test_the_page_of_chunk_steps_names_every_option():
    from dataclasses import fields

    from qinvert import ChunkOptions
    from qinvert.chunk_step.form import Form

    parts = sections(page("chunk-step.md"))
    named = [name for row in rows(parts["Calibrate"]) for name in quoted(row["`ChunkOptions`"])]
    assert sorted(named) == sorted(field.name for field in fields(ChunkOptions))
    assert {quoted(row["`form`"])[0] for row in rows(parts["What it computes"])} == {*Form}
