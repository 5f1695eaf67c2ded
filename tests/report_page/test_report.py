import re
import sys
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

import qinvert
from qinvert.calibration.growth import range_growth
from qinvert.calibration.planning.verdicts import Outcome, verdicts
from qinvert.cli.app import cli
from qinvert.errors import InputError, MissingDependencyError, PlanError
from qinvert.stress import stress_matrices

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def lower():
    return {"a<b": stress_matrices("correlated_keys", 4, 8)}


@pytest.fixture(scope="module")
def plan(lower):
    return qinvert.calibrate(lower)


def test_a_plan_alone_gives_the_same_bytes_and_says_what_it_lacks(plan, tmp_path):
    page = qinvert.report(plan, path=tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text() == page == qinvert.report(plan)
    assert "Pass matrices L or a model with data" in page
    assert "a&lt;b" in page
    assert "<b:" not in page
    assert len(page) < 3_000_000


def test_matrices_add_growth_values_and_widths(plan, lower):
    page = qinvert.report(plan, lower)
    assert "Powers of M against the inverse" in page
    assert "Error against bits of" in page
    assert not re.search(r'(src|href)="https?:', page)
    idents = re.findall(r'\bid="([^"]+)"', page)
    assert len(idents) == len(set(idents))
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert ElementTree.fromstring(drawing).get("aria-label")


def test_a_missed_goal_is_said_with_its_remedy(lower):
    page = qinvert.report(qinvert.calibrate(lower, bits=8, min_sqnr_db=60))
    assert "misses its goal" in page
    assert "qinvert calibrate" in page
    assert "qinvert export" not in page


def test_wrong_arguments_are_refused_before_the_work(plan, tmp_path):
    with pytest.raises(PlanError, match="unknown layer 'x'"):
        qinvert.report(plan, layers=["x"])
    with pytest.raises(InputError, match="cannot write"):
        qinvert.report(plan, path=tmp_path / "no" / "a.html")


def test_a_missing_package_is_named(plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match=r"qinvert\[report\]"):
        qinvert.report(plan)


def test_the_growth_in_a_figure_is_that_of_the_numbers(lower):
    growth = range_growth(lower.items())
    ax = qinvert.plot.range_growth(growth)
    (found,) = growth.values()
    line = next(line for line in ax.lines if line.get_label() == "a<b")
    largest = max(found.inverse, found.powers[1])
    assert list(line.get_ydata()) == [max(v / largest, 1e-3) for v in found.powers.values()]


def test_every_candidate_has_a_reason_and_one_is_chosen(plan):
    found = verdicts(plan.layer(), 20.0, 1.0)
    assert [v.outcome for v in found].count(Outcome.CHOSEN) == 1
    assert all(v.reason.endswith(".") for v in found)
    assert all(v.sqnr_db < 200 for v in verdicts(plan.layer(), 200.0) if v.outcome is Outcome.BELOW_GOAL)


def test_results_show_themselves_in_notebooks(plan, lower):
    report = qinvert.simulate(plan, lower)
    assert repr(plan).startswith("<Plan for npu-qdq-int8: 1 entries")
    assert "1 entries: worst sqnr" in repr(report)
    for shown in (plan._repr_html_(), report._repr_html_()):
        assert "a&lt;b" in ElementTree.tostring(ElementTree.fromstring(shown), encoding="unicode")


def test_the_verb_writes_the_page(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    result = CliRunner().invoke(cli, ["report", str(tmp_path / "plan.json"), "-o", str(tmp_path / "r.html")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "r.html").read_text().lstrip().startswith("<!doctype html>")
