import math

import pytest

from qinvert import plot
from qinvert.calibration.head_errors import CARRIES, HeadErrors

pytest.importorskip("matplotlib")


def head(number, sqnr_db, share=0.25):
    return HeadErrors(head=number, sqnr_db=sqnr_db, signal_share=share)


HEADS = {
    "a": [head(0, 31.2), head(1, math.inf), head(3, -math.inf)],
    "b": [head(0, 12.0, CARRIES / 2), head(2, 40.0)],
}


def test_every_head_has_its_cell_and_its_number():
    ax = plot.head_errors(HEADS)
    cells = ax.images[0].get_array()
    assert cells.shape == (2, 4)
    assert float(cells[0][0]) == 31.2
    assert float(cells[1][2]) == 40.0
    # A head that is missing, or without a number, has no colour.
    assert all(cells.mask[row][column] for row, column in ((0, 1), (0, 2), (0, 3), (1, 1), (1, 3)))
    written = {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in ax.texts}
    assert written == {(0, 0): "31", (1, 0): "exact", (3, 0): "none", (0, 1): "12", (2, 1): "40"}


def test_only_heads_without_a_share_of_the_signal_are_hatched():
    (hatched,) = [patch for patch in plot.head_errors(HEADS).patches if patch.get_hatch()]
    assert (hatched.get_x() + 0.5, hatched.get_y() + 0.5) == (0, 1)


def test_the_figure_says_what_was_measured():
    figure = plot.head_errors(HEADS, "output").figure
    assert "sqnr of output, dB" in [ax.get_xlabel() for ax in figure.axes]


def test_many_heads_are_not_written_upon_each_other():
    ax = plot.head_errors({"a": [head(i, 30.0) for i in range(64)]})
    assert not ax.texts
    assert len(ax.get_xticks()) == 16
