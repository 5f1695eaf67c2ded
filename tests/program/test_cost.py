from __future__ import annotations

import pytest
import torch
from inverse_programs import inverse_program

from qinvert.errors import ProgramError
from qinvert.methods import (
    banded_residual,
    block_merge,
    column_sweep,
    forward_substitution,
    neumann,
    neumann_doubling,
    newton_schulz,
)
from qinvert.program.ports import MATRIX
from qinvert.program.program import Program
from qinvert.program.steps import Add, Constant, Mask, MatMul, Rescale

DENSE = 64**3


def program(*steps, output, **fields) -> Program:
    return inverse_program(*steps, output=output, **fields)


square = MatMul(output="square", left=MATRIX, right=MATRIX)


def macs_of_a_run(tested: Program) -> int:
    shapes = {}
    source = torch.zeros(tested.chunk, tested.chunk)
    tested.run(source, observe=lambda name, value: shapes.setdefault(name, value.shape))
    products = [step for step in tested.steps if isinstance(step, MatMul)]
    return sum(shapes[p.output].numel() * shapes[p.left][-1] for p in products)


@pytest.mark.parametrize(
    ("tested", "macs", "matmuls"),
    [
        (block_merge(64, 1), 87_296, 10),
        (block_merge(64, 4), 89_088, 10),
        (block_merge(64, 16), 180_224, 10),
        (block_merge(64, 4, layout="masked"), 10 * DENSE, 10),
        (neumann_doubling(64), 10 * DENSE, 10),
        (neumann(64, 15), 14 * DENSE, 14),
        (neumann(64, 1), 0, 0),
        (banded_residual(64, 3, 8), 8 * DENSE, 8),
        (newton_schulz(64), 22 * DENSE, 22),
        (forward_substitution(64), 85_343, 62),
        (column_sweep(64), 62 * DENSE, 62),
    ],
    ids=lambda value: value.title if isinstance(value, Program) else str(value),
)
def test_published_costs_at_64(tested, macs, matmuls):
    cost = tested.cost()
    assert (cost.macs, cost.matmuls) == (macs, matmuls)
    assert cost.macs == macs_of_a_run(tested)


def test_depth_is_the_longest_chain_of_products():
    other = MatMul(output="other", left=MATRIX, right=MATRIX)
    chained = MatMul(output="chained", left="other", right=MATRIX, add=("square",))
    assert program(square, other, output="other").cost().depth == 1
    assert program(square, other, chained, output="chained").cost().depth == 2
    assert program(square, other, chained, output="square").cost().depth == 1
    assert neumann(64, 15).cost().depth == 14
    assert neumann_doubling(64).cost().depth <= 10


def test_elements_count_reads_and_writes():
    doubled = Add(output="doubled", left=MATRIX, right="square")
    assert program(square, output="square").cost().elements == 3 * 16
    assert program(square, doubled, output="doubled").cost().elements == 6 * 16


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_bytes_are_elements_times_their_width(width):
    tested = neumann(16, 5)
    cost = tested.cost(bytes_per_element=width)
    assert cost.bytes == width * cost.elements
    assert cost.elements == tested.cost().elements == tested.cost().bytes


@pytest.mark.parametrize("width", [0, 3, 16, 1.0, True, None])
def test_other_widths_are_refused(width):
    with pytest.raises(ProgramError, match=r"bytes_per_element .* is not a power of two in \[1, 8\]; int8"):
        neumann(16, 5).cost(bytes_per_element=width)


def test_nodes_are_steps_and_constants_are_neither():
    tested = block_merge(8, 2)
    assert tested.constants
    assert tested.cost().nodes == tested.cost().steps == len(tested.steps)


def test_masks_move_their_source_and_not_the_constant():
    band = Constant(name="band", rows=4, columns=4, ones=((0, 1),) * 4)
    masked = Mask(output="masked", source=MATRIX, constant="band")
    assert program(masked, output="masked", constants=(band,)).cost().elements == 2 * 16


@pytest.mark.parametrize("tested", [block_merge(8, 2, corrections=1), neumann_doubling(8)], ids=str)
def test_printing_shows_title_every_tensor_and_the_total(tested):
    lines = str(tested).splitlines()
    assert lines[0] == tested.title
    tensors = lines[2:-1]
    assert [line.split()[0] for line in tensors] == [step.output for step in tested.steps]
    assert all(str(tested.shapes[line.split()[0]]) in line for line in tensors)
    assert lines[-1].startswith(
        f"T = I + {tested.outputs[0].tensor}: {tested.cost().macs:,} multiply-accumulates"
    )


def test_printing_shows_formulas():
    text = str(block_merge(4, 2, corrections=1))
    assert "merge_4/S22 @ merge_4/Y + merge_4/Y" in text
    assert "M @ merge_4/S + M - merge_4/S" in text
    assert "concat(zeros_2, merge_4/S22)" in text


def test_printing_shows_factors():
    halved = Rescale(output="halved", source=MATRIX, factor=-0.5)
    same = Rescale(output="same", source=MATRIX)
    text = str(program(halved, same, output="same"))
    assert "rescale(-0.5 * M)" in text
    assert "rescale(M)" in text


def test_printing_an_explicit_inverse_adds_no_identity():
    assert "T = square: " in str(program(square, output="square", identity=True))


def test_titles_name_the_arguments_that_matter():
    assert block_merge(64).title == block_merge(64, tile=4).title == "block_merge(chunk=64, base=4)"
    assert block_merge(64, 4, tile=16).title == "block_merge(chunk=64, base=4, tile=16)"
    assert block_merge(64, 4, tile=64).title == "block_merge(chunk=64, base=4, layout=masked)"
    assert neumann(32, 7).title == "neumann(chunk=32, order=7)"
