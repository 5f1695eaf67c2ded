import pytest

from qinvert import plot
from qinvert.calibration.figures_of_merit import Figures

pytest.importorskip("matplotlib")


def figures(**known):
    names = ("predicted", "sample", "floor", "held_out", "held_out_low", "held_out_high", "now")
    return Figures(**{f"{name}_db": known.get(name) for name in names})


def points(ax):
    """What is drawn, by the name of its series: places of markers."""
    return {c.get_label(): [tuple(p) for p in c.get_offsets().tolist()] for c in ax.collections}


def test_every_figure_stands_on_the_line_of_its_layer():
    ax = plot.drift({"a": figures(sample=30, now=28), "b": figures(sample=40, predicted=41)})
    found = points(ax)
    assert found["calibration sample"] == [(30, 0), (40, 1)]
    assert found["this report's data"] == [(28, 0)]
    assert found["predicted"] == [(41, 1)]
    # Nothing stands for what was not measured.
    assert "floor of the grids" not in found
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert ax.yaxis_inverted()


def test_held_out_matrices_are_drawn_with_the_interval():
    ax = plot.drift({"a": figures(held_out=30, held_out_low=28, held_out_high=500)}, goal_db=20)
    lines = [line.get_xdata() for line in ax.lines]
    # Without noise there is no upper end, and the figure ends somewhere.
    assert [28, 200] in [list(x) for x in lines]
    assert "goal, 20 dB" in [line.get_label() for line in ax.lines]


def test_figures_without_noise_or_signal_have_no_place():
    found = points(plot.drift({"a": figures(sample=3.4e38, now=-3.4e38, predicted=10)}))
    assert list(found) == ["predicted"]
