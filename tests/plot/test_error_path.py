import math

import pytest

from qinvert import plot
from qinvert.calibration.evaluate import Evaluation, LayerErrors
from qinvert.plot.error_path import NAMED, RANKED, harm

pytest.importorskip("matplotlib")


def evaluation(**layers):
    return Evaluation(kl=0.1, top1_agreement=1.0, loss=1.0, loss_delta=0.0, tokens=8, layers=layers)


def errors(out, t=30.0, u=31.0, w=32.0, state=33.0):
    return LayerErrors(t=t, u=u, w=w, out=out, state=state)


def test_shares_are_those_of_relative_noise():
    # 10 dB less are ten times the noise, and nothing is no noise at all.
    shares = harm(evaluation(a=errors(30.0), b=errors(20.0), c=errors(math.inf)))
    assert list(shares) == ["b", "a", "c"]
    assert shares["b"] == pytest.approx(10 / 11)
    assert shares["a"] == pytest.approx(1 / 11)
    assert shares["c"] == 0
    # A layer of noise alone takes all of it, and is a number.
    assert harm(evaluation(a=errors(30.0), b=errors(-math.inf)))["b"] == pytest.approx(1)


def test_the_worst_layer_is_the_longest_bar():
    ax = plot.layer_harm(evaluation(a=errors(30.0), b=errors(20.0)))
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([1000 / 11, 100 / 11])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a"]
    assert ax.yaxis_inverted()
    many = evaluation(**{f"layer_{i}": errors(20.0 + i) for i in range(RANKED + 5)})
    assert len(plot.layer_harm(many).patches) == RANKED


def test_the_path_goes_through_all_stages_that_were_measured():
    ax = plot.error_path(evaluation(a=errors(34.0)))
    (line,) = ax.lines
    assert list(line.get_ydata()) == [30, 31, 32, 33, 34]
    steps = plot.error_path(evaluation(a=errors(34.0, t=None, u=None, w=None)))
    assert list(steps.lines[0].get_ydata()) == [33, 34]
    assert [label.get_text() for label in steps.get_xticklabels()] == ["state", "output"]


def test_only_the_layers_that_do_the_most_harm_have_names():
    layers = {f"layer_{i}": errors(20.0 + i, t=math.inf) for i in range(NAMED + 3)}
    lines = {line.get_label(): line for line in plot.error_path(evaluation(**layers)).lines}
    assert {name for name in lines if not name.startswith("_")} == {f"layer_{i}" for i in range(NAMED)}
    # Without an error there is no point.
    assert math.isnan(lines["layer_0"].get_ydata()[0])
