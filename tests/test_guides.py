"""Tutorial, guides, concepts and reference: every example runs, and what they list is what the code has."""

import math
import re

import pytest
from page_examples import blocks, matches, run_page
from pages import ROOT, quoted, rows

import qinvert
from qinvert import plot
from qinvert.cli.verbs import VERBS
from qinvert.export.rules.rules import RULES

#: Pages whose examples are run here, from the first to the last; others have tests of their own.
RUN = {
    "docs/tutorial.md",
    "docs/guides/mixed-precision.md",
    "docs/guides/npus.md",
    "docs/guides/own-graph.md",
    "docs/guides/report.md",
    "docs/guides/several-gpus.md",
    "docs/concepts/ranges.md",
    "docs/concepts/rounding.md",
    "docs/reference/rules.md",
}
#: What runs the examples of the others, or the same calls on a model or a GPU.
ELSEWHERE = {
    "docs/chunk-step.md": "tests/test_pages.py",
    "docs/extending.md": "tests/test_extending.py",
    "docs/gpu.md": "tests/kernels/test_device.py",
    "docs/graphs.md": "tests/export/whole_models/test_export_model.py",
}


def text(page):
    return (ROOT / page).read_text()


@pytest.mark.parametrize("page", sorted(RUN))
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    if "with a model" in text(page).lower() or "several" in page:
        pytest.importorskip("transformers")
    session = run_page(page, tmp_path, monkeypatch)
    if session.missing:
        pytest.skip(f"all but the compilers of {', '.join(sorted(session.missing))} ran")


def test_no_page_has_examples_that_nothing_runs():
    pages = {str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if blocks(page)} == RUN | {*ELSEWHERE}
    assert all((ROOT / runner).exists() for runner in ELSEWHERE.values())


@pytest.mark.parametrize(
    ("expected", "found", "alike"),
    [
        ("wrote plan.json", "a table\nwrote plan.json\n", True),
        ("wrote plan.json", "wrote graph.onnx", False),
        ("│ 0 │ ... │ 41.7 │", "│ 0 │ int8 │ 41.5 │", True),
        ("│ 0 │ ... │ 41.7 │", "│ 0 │ int8 │ 31.5 │", False),
        ("131072 of 131072", "131072 of 31072", False),
    ],
)
def test_shown_output_is_compared(expected, found, alike):
    assert matches(expected, found) == alike


def test_the_binomials_of_the_page_on_ranges_are_right():
    (shown,) = re.findall(r"end is ([\d,]+) rounds", text("docs/concepts/ranges.md").replace("\n", " "))
    assert int(shown.replace(",", "")) == math.comb(62, 7)


def test_the_reference_has_every_verb():
    named = re.findall(r"^:prog: qinvert (.*)$", text("docs/reference/command-line.md"), re.MULTILINE)
    assert sorted(named) == sorted(VERBS)


def test_the_reference_has_every_public_name_once():
    lines = re.findall(
        r"^(?:   |\.\. autofunction:: )(?:qinvert\.)?([A-Za-z_]\w*)$",
        text("docs/reference/api.md"),
        re.MULTILINE,
    )
    # The package that is also a verb stands there as its function, and figures under their package.
    missing = {"export", "plot", "__version__"}
    assert sorted(lines) == sorted([*({*qinvert.__all__} - missing), *plot.__all__])


def test_the_reference_has_every_rule_with_its_remedy():
    table = rows(text("docs/reference/rules.md"))
    found = {quoted(row["rule"])[0]: row["what to do otherwise"] for row in table}
    assert found == {name: remedy for name, (remedy, _) in RULES.items()}


def test_every_page_is_in_the_contents():
    listed = set(re.findall(r"^([\w/-]+)$", text("docs/index.md"), re.MULTILINE))
    pages = {str(file.relative_to(ROOT / "docs").with_suffix("")) for file in (ROOT / "docs").rglob("*.md")}
    assert listed == {page for page in pages if not page.startswith("reference/tables/")} - {"index"}
