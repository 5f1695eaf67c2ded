"""Programs on tiles compute what they compute on whole matrices."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inverse_programs import inverse_program

import qinvert
from qinvert.execution.floating import run
from qinvert.kernels.source import Source, pattern
from qinvert.kernels.tile_evaluator import TileEvaluator
from qinvert.kernels.tiles import TILE, TileOps, UnsupportedError
from qinvert.program.ports import MATRIX
from qinvert.program.steps import Axis, Concat, Mask, MatMul, Slice
from qinvert.stress import stress_matrices


class ExactOps(TileOps):
    """Tiles of one matrix in float64, without rounding."""

    def __init__(self, lower):
        self.lower = lower
        self.products = 0

    def load(self, position):
        i, j = (TILE * k for k in position)
        return -self.lower[i : i + TILE, j : j + TILE].tril(-1 if i == j else TILE)

    def mask(self, value, keep, support):
        assert not value[~torch.from_numpy(support)].any()
        return value * torch.from_numpy(keep)

    def merge(self, left, right):
        assert not (left * right).any()
        return left + right

    def matmul(self, step, position, pairs, add, subtract):
        self.products += len(pairs)
        total = torch.zeros(TILE, TILE, dtype=torch.float64)
        for left, right in pairs.values():
            total += left @ right
        return total + sum(v for _, v in add) - sum(v for _, v in subtract)

    def add(self, step, terms):
        return sum(v for _, v in terms)

    def rescale(self, step, source):
        return step.factor * source


def assembled(result, chunk):
    matrix = torch.zeros(chunk, chunk, dtype=torch.float64)
    for (i, j), value in result.tiles.items():
        matrix[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE] = value
    return matrix


PROGRAMS = [
    *(qinvert.block_merge(c, base=b) for c in (16, 32, 64) for b in (1, 2, 4, 16)),
    *(qinvert.block_merge(c, base=2, layout="masked", corrections=1) for c in (16, 64)),
    qinvert.block_merge(64, base=4, tile=16, corrections=2),
    qinvert.block_merge(128, base=1, tile=16),
    qinvert.block_merge(64, base=8, tile=32),
    *(qinvert.elimination(c, side) for c in (16, 32, 64) for side in ("left", "right")),
    qinvert.elimination(64, tile=16, corrections=1),
    qinvert.elimination(64, "right", restart=4),
    qinvert.newton_schulz(32),
    qinvert.neumann_doubling(32),
    qinvert.banded_residual(64),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.title)
def test_tiles_compute_what_matrices_do(program):
    lower = stress_matrices("correlated_keys", 1, program.chunk, seed=5)[0].double()
    result = TileEvaluator(program, ExactOps(lower)).run()
    expected = run(program, lower, dtype=torch.float64)
    if not program.inverse_ports.holds_identity:
        expected = expected - torch.eye(program.chunk, dtype=torch.float64)
    assert torch.allclose(assembled(result, program.chunk), expected, rtol=1e-9, atol=1e-6)
    # A tile is present exactly where something may stand.
    outside = ~torch.from_numpy(result.support)
    assert not assembled(result, program.chunk)[outside].any()


def test_zero_tiles_are_not_multiplied():
    ops = ExactOps(torch.zeros(64, 64, dtype=torch.float64))
    TileEvaluator(qinvert.block_merge(64, base=1, tile=16), ops).run()
    # 4 tiles of the diagonal with 6 products, 2 merges of 2, one of 4 tiles with 6 + 6 instead of 8 + 8.
    assert ops.products == 4 * 6 + 2 * 2 + 12


@pytest.mark.parametrize(
    ("options", "products"), [({}, 50), ({"side": "right"}, 50), ({"tile": 16}, 32), ({"restart": 4}, 32)]
)
def test_elimination_multiplies_fewer_tiles_where_it_does_not_carry_the_rest(options, products):
    ops = ExactOps(torch.zeros(64, 64, dtype=torch.float64))
    TileEvaluator(qinvert.elimination(64, **options), ops).run()
    # 4 levels of 4 tiles, then 16 for two merges or the restart and two levels; dense, all 10 tiles at
    # 4 levels, and 10 for the last two.
    assert ops.products == products


def test_programs_without_a_form_on_tiles_say_why():
    zeros = ExactOps(torch.zeros(32, 32, dtype=torch.float64))
    for program, words in (
        (qinvert.block_merge(8), "smaller than a tile"),
        (qinvert.block_merge(32, factored=True), "takes beta"),
        (shuffled(), "do not meet"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            TileEvaluator(program, zeros).run()


def shuffled():
    """A product of two blocks that stand beside each other."""
    top = {"rows": (0, 16), "columns": (0, 16)}
    steps = (
        Slice(output="a", source=MATRIX, **top),
        Slice(output="b", source=MATRIX, rows=(16, 32), columns=(0, 16)),
        MatMul(output="c", left="a", right="b"),
        Concat(output="left", sources=("c", "c"), axis=Axis.ROWS),
        Concat(output="whole", sources=("left", "left"), axis=Axis.COLUMNS),
    )
    return inverse_program(*steps, name="shuffled", chunk=32, output="whole")


def masks(program):
    return [step for step in program.steps if isinstance(step, Mask)]


def evaluated(mask, source):
    row, column = np.arange(TILE)[:, None], np.arange(TILE)[None, :]
    scope = {"row": row, "column": column, "tl": np}
    for statement in source.statements:
        scope[statement.variable] = eval(statement.expression.text, scope)
    return np.broadcast_to(eval(mask.text, scope), (TILE, TILE))


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 1), st.booleans())
def test_mask_expressions_are_true_exactly_where_they_must(seed, share, lower):
    rng = np.random.default_rng(seed)
    support = rng.random((TILE, TILE)) < 0.8
    if lower:
        support &= np.tri(TILE, TILE, -1, dtype=bool)
    keep = support & (rng.random((TILE, TILE)) < share)
    if keep.any():
        source = Source()
        found = evaluated(pattern(keep, support, source), source)
        assert (found[support] == keep[support]).all()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_block_masks_are_one_interval(size):
    lower = np.tri(TILE, TILE, -1, dtype=bool)
    row, column = np.arange(TILE)[:, None] // size, np.arange(TILE)[None, :] // size
    source = Source()
    for keep in (lower & (row == column), lower & (row % 2 == 1) & (column == row - 1)):
        (name,) = pattern(keep, lower, source).reads
        assert name == source.statements[-1].variable
        assert "^" in source.statements[-1].text
    # One statement for each of the two.
    assert len(source.statements) == 2
    assert math.prod(lower.shape) == TILE**2
