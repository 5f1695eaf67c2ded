"""Pages of plans of heads, of chunk steps, and of a missed goal, on the embedded model."""

import re
import warnings
from dataclasses import replace
from html import unescape

import pytest

import qinvert
from qinvert import recall
from qinvert.calibration.simulate import Report
from qinvert.report_page.evidence import Evidence
from qinvert.report_page.words import TOUCHING, Status, counted, layer_words, number
from qinvert.stress import stress_matrices

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    return recall.load_model()


@pytest.fixture(scope="module")
def tokens():
    return recall.sequences(4)


def tables(page):
    """Every table of a page by its caption: rows of texts."""
    found = {}
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        caption = unescape(re.search(r"<caption>(.*?)</caption>", table).group(1))
        body = table.split("<tbody>")[1]
        found[caption] = [
            [unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)]
            for row in re.findall(r"<tr>.*?</tr>", body, re.DOTALL)
        ]
    return found


def drawings(page):
    """What the drawings of a page show, in words."""
    return [unescape(text) for text in re.findall(r'<svg[^>]*aria-label="([^"]*)"', page)]


def test_a_plan_of_heads_shows_each_head_once_in_the_row_of_its_layer(model, tokens):
    plan = qinvert.calibrate(model, tokens, granularity="head", method="block_merge", bits=8)
    alone, whole = qinvert.report(plan), qinvert.report(plan, model, data=tokens)
    report = qinvert.simulate(plan, model, tokens)
    for page in (alone, whole):
        rows = tables(page)["Heads: sqnr of T, floor and shares"]
        layers = [f"model.layers.{i}.linear_attn" for i in (0, 1)]
        assert [row[0] for row in rows] == [f"{layer}, {head}" for layer in layers for head in (0, 1)]
        assert all("/head_" in name for name in plan.layers)
    shown = [row[1] for row in tables(whole)["Heads: sqnr of T, floor and shares"]]
    assert shown == [f"{r.sqnr_db:.1f}" for r in report.layers.values()]
    # Of the two heads of each layer both shares are there.
    shares = [float(row[3].rstrip("%")) for row in tables(alone)["Heads: sqnr of T, floor and shares"]]
    assert shares[0] + shares[1] == pytest.approx(100, abs=0.1)
    assert "Where the error goes" in whole
    assert any(words.startswith("Layers ranked by harm") for words in drawings(whole))


def test_a_plan_of_chunk_steps_shows_outputs_and_what_is_not_drawn_of_steps(model, tokens):
    plan = qinvert.calibrate(model, tokens, scope="chunk", bits=8)
    page = qinvert.report(plan, model, data=tokens)
    assert "whole chunk steps" in page
    report = qinvert.simulate(plan, model, tokens)
    shown = [row[1] for row in tables(page)["Heads: sqnr of output, floor and shares"]]
    assert shown == [f"{v:.1f}" for r in report.steps.values() for v in r.head_sqnr_o_db]
    assert "sqnr of output, dB" in page
    assert "sqnr of output or state, dB" in page
    assert "sqnr of T, dB" not in page
    for lack in (
        "Histograms are drawn of plans of inverses",
        "Other widths are tried on programs of inverses",
    ):
        assert lack in page
    # A head that its layer hides is a caution.
    name, step = next(iter(report.steps.items()))
    for output_db, said in ((1.0, True), (30.0, False)):
        steps = {name: replace(step, head_sqnr_o_db=(output_db, 40.0), saturations={})}
        words = layer_words(Evidence(plan=plan, report=Report(steps=steps)), name)
        assert any(f"head 0 {output_db:.1f} dB" in remark for remark in words.remarks) == said
    # A step has a dozen parameters, and the heading the two words that tell it from others.
    headings = re.findall(r"<h3>(.*?)</h3>", page)
    assert any(text.startswith("gated_delta_step with elimination(") for text in headings)
    assert max(map(len, headings)) < 110


def test_a_missed_goal_is_said_by_every_entry_and_every_candidate():
    lower = {"a": stress_matrices("half_random", 4, 16), "b": stress_matrices("half_random", 4, 16, seed=1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = qinvert.calibrate(lower, bits=8, min_sqnr_db=60)
    page = qinvert.report(plan, lower)
    assert "2 of 2 entries miss a goal." in page
    assert len(re.findall(r'<li class="missed">', page)) == 2
    candidates = tables(page)["Candidates of a"]
    assert {row[2] for row in candidates} <= {"chosen", "below the goal", "its powers grow"}
    below = [row[-1] for row in candidates if row[2] == "below the goal"]
    assert below
    assert all(reason.endswith("dB to the goal of 60 dB.") for reason in below)
    assert "--bits 8x2 --target int-ops --min-sqnr 60" in page


def test_values_that_touch_their_ends_are_no_caution_and_many_are():
    lower = {"a": stress_matrices("half_random", 4, 16)}
    plan = qinvert.calibrate(lower, bits=8)
    report = qinvert.simulate(plan, lower).layers["a"]
    proof = plan.layers["a"].proof()
    tensor, values = next(iter((*proof.unproved, *proof.may_saturate))), report.matrices * 16 * 16

    def status(count):
        found = replace(report, saturations={tensor: count})
        return layer_words(Evidence(plan=plan, report=Report(layers={"a": found})), "a")

    assert status(0).status is Status.MET
    assert status(1 + int(TOUCHING * values)).status is Status.CAUTION
    assert "1 tensor" in status(values).remarks[0]


def test_numbers_and_their_nouns_are_words_of_a_sentence():
    assert [counted(n, "value") for n in (0, 1, 1234)] == ["0 values", "1 value", "1,234 values"]
    shown = [number(x) for x in (None, 3.0, 0.123456, 66812.3, 1234567.8, 7.16e16, 12345)]
    assert shown == ["-", "3", "0.123", "66,800", "1.23e+06", "7.16e+16", "12,345"]
