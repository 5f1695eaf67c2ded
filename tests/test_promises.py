"""The page of promises names every profile and runtime, tests that exist, and what the code promises."""

import re
from types import SimpleNamespace

import pytest
from pages import ROOT, page, quoted, rows, sections

from qinvert.export.runtimes import RUNTIMES
from qinvert.export.verification.tolerance import is_exact
from qinvert.formats import find_format
from qinvert.profiles import PROFILES

PARTS = sections(page("promises.md"))
TABLES = {name: rows(PARTS[name]) for name in ("The simulation", "Graphs in onnxruntime", "Runtimes")}
GRAPHS = TABLES["Graphs in onnxruntime"]
SCALES = {"power-of-two": (0.25,), "any": (0.25, 0.3)}
MODES = ("soak values", "soak steps")


def missing(text):
    """What a cell names that does not exist: files, functions in them, and modes of the soak."""
    found = []
    for test in quoted(text):
        file, _, function = test.partition("::")
        path = ROOT / file
        content = path.read_text() if path.is_file() else ""
        wanted = rf"^def {function}\(" if function else r"^def test_"
        if not re.search(wanted, content, re.MULTILINE):
            found.append(test)
    return found


@pytest.mark.parametrize("title", TABLES)
def test_every_row_names_tests_that_exist(title):
    for row in TABLES[title]:
        holds = row["held by"]
        assert quoted(holds) or any(mode in holds for mode in MODES), row
        assert missing(holds) == [], row
        assert set(re.findall(r"soak \w+", holds)) <= set(MODES), row


def test_a_test_that_does_not_exist_is_noticed():
    assert missing("`tests/test_promises.py::test_nothing`, `tests/test_none.py`") == [
        "tests/test_promises.py::test_nothing",
        "tests/test_none.py",
    ]
    assert missing("`tests/test_promises.py`") == []


def test_every_profile_and_every_runtime_has_a_row():
    assert {quoted(row["profile"])[0] for row in GRAPHS} == set(PROFILES)
    assert {quoted(row["runtime"])[0] for row in TABLES["Runtimes"]} == set(RUNTIMES)


# Rows have numbers for names: what is called x86 is skipped on some processors.
@pytest.mark.parametrize("row", GRAPHS, ids=range(len(GRAPHS)))
def test_exact_stands_where_the_code_promises_it(row):
    profile = PROFILES[quoted(row["profile"])[0]]
    formats = [find_format(name) for name in row["formats"].split(", ")]
    assert formats == list(profile.formats)
    promised = all(
        is_exact(
            profile,
            SimpleNamespace(
                tensors={"a": SimpleNamespace(format=fmt, scale=scale)}, program=SimpleNamespace(steps=())
            ),
        )
        for fmt in formats
        for scale in SCALES[row["scales"]]
    )
    assert promised == row["promise"].startswith("exact")


def test_profiles_with_float_scales_have_a_row_for_them():
    for name, profile in PROFILES.items():
        told = {row["scales"] for row in GRAPHS if quoted(row["profile"])[0] == name}
        assert ("any" in told) != profile.power_of_two_scales, name
