"""Which tensors of a plan a graph stores with an identity, and what becomes of it when they are moved."""

import numpy as np
import pytest
from inverse_programs import inverse_program

from qinvert.formats import INT8
from qinvert.methods import block_merge, elimination
from qinvert.numerics.scales import float32
from qinvert.plan.carried_identity import CarriedIdentities, joined_ones, one_of, sliced_ones
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import MATRIX
from qinvert.program.sparsity import zero_diagonals
from qinvert.program.steps import Axis, Concat, MatMul, Slice

EYE = np.eye(4, dtype=np.bool_)
NONE = np.zeros((4, 4), np.bool_)


def planned(program, scale=1 / 127, requantize=Requantize.MULTIPLIER, **scales):
    tensors = {
        name: Quantization(format=INT8, scale=float32(scales.get(name, scale))) for name in program.tensors
    }
    return LayerPlan(program=program, tensors=tensors, requantize=requantize)


def square(*add):
    return MatMul(output="P", left=MATRIX, right=MATRIX, add=add)


@pytest.mark.parametrize("program", [block_merge(8, 2), elimination(8)], ids=lambda program: program.title)
def test_strictly_lower_tensors_with_room_for_one_can_carry_it(program):
    found = CarriedIdentities(planned(program))
    assert {name for name in program.tensors if found.carries(name)} == zero_diagonals(program)
    # What leaves the graph as integers must be those of the program.
    result = program.inverse_ports.result
    assert not CarriedIdentities(planned(program), [result]).carries(result)


@pytest.mark.parametrize(
    ("scale", "requantize"),
    [
        (1 / 131, Requantize.MULTIPLIER),
        (0.01234, Requantize.MULTIPLIER),
        (1 / 127, Requantize.DIVIDE),
    ],
)
def test_without_an_integer_for_one_or_one_factor_nothing_is_carried(scale, requantize):
    program = inverse_program(square())
    plan = planned(program, scale, requantize)
    found = CarriedIdentities(plan)
    assert not any(found.carries(name) for name in program.tensors)
    assert one_of(plan.tensors[MATRIX]) == (127 if requantize is Requantize.DIVIDE else 0)


@pytest.mark.parametrize(
    ("terms", "taken"),
    [((), (False, False)), ((MATRIX,), (True, False)), ((MATRIX, MATRIX), (True, True))],
)
def test_each_residual_term_takes_one_operand(terms, taken):
    step = square(*terms)
    assert CarriedIdentities(planned(inverse_program(step))).taken_by(step) == taken


def test_both_operands_take_it_only_where_the_result_carries_the_identity_that_is_left():
    step = square(MATRIX, MATRIX)
    returned = CarriedIdentities(planned(inverse_program(step)), ["P"])
    # One is not enough for two terms, and a product that is widened anyway needs none.
    assert returned.taken_by(step) == (False, False)
    coarse = planned(inverse_program(step), P=1 / 64)
    assert CarriedIdentities(coarse).taken_by(step) == (True, True)
    none = planned(inverse_program(step), P=0.01234)
    assert CarriedIdentities(none).taken_by(step) == (False, False)


def test_a_slice_keeps_the_ones_that_it_cuts_out():
    corner = {"output": "c", "source": "A"}
    diagonal = sliced_ones(Slice(rows=(0, 2), columns=(0, 2), **corner), EYE)
    assert np.array_equal(diagonal, np.eye(2))
    assert np.array_equal(sliced_ones(Slice(rows=(1, 3), **corner), EYE), EYE[1:3])
    assert sliced_ones(Slice(rows=(2, 4), columns=(0, 2), **corner), EYE) is None
    assert sliced_ones(Slice(rows=(0, 2), **corner), None) is None


def test_a_concat_joins_ones_along_rows_and_columns_and_of_blocks_only_equal_ones():
    rows, columns, blocks = (
        Concat(output="c", sources=("a", "b"), axis=axis) for axis in (Axis.ROWS, Axis.COLUMNS, Axis.BLOCKS)
    )
    assert np.array_equal(joined_ones(rows, [EYE, NONE]), np.vstack([EYE, NONE]))
    assert np.array_equal(joined_ones(columns, [NONE, EYE]), np.hstack([NONE, EYE]))
    assert np.array_equal(joined_ones(blocks, [EYE, EYE]), EYE)
    assert joined_ones(blocks, [EYE, NONE]) is None
