from __future__ import annotations

import math
import weakref

import pytest
from inverse_programs import inverse_program

from qinvert.errors import ProgramError
from qinvert.execution.tensors import constant_matrix
from qinvert.methods import neumann_doubling
from qinvert.numerics.scales import MAX_SCALE, MIN_SCALE
from qinvert.program.evaluator import Evaluator
from qinvert.program.ports import MATRIX
from qinvert.program.program import Program
from qinvert.program.steps import (
    MAX_FACTOR,
    MIN_FACTOR,
    Add,
    Axis,
    Concat,
    Constant,
    Exponential,
    Mask,
    MatMul,
    Multiply,
    Rescale,
    Shape,
    Slice,
    Subtract,
    Transpose,
    check_chunk,
)


def program(*steps, constants=(), output=None, chunk=4, **fields) -> Program:
    output = output or (steps[-1].output if steps else MATRIX)
    return inverse_program(*steps, chunk=chunk, constants=constants, output=output, **fields)


def zeros(rows, columns=4, name="zeros"):
    return Constant(name=name, rows=rows, columns=columns, ones=((0, 0),) * rows)


square = MatMul(output="square", left=MATRIX, right=MATRIX)
top = Slice(output="top", source=MATRIX, rows=(0, 2))
corner = Slice(output="corner", source=MATRIX, rows=(0, 2), columns=(0, 2))

WRONG = {
    "unknown name": (
        [MatMul(output="a", left="b", right=MATRIX)],
        [],
        r"'a' reads 'b'.*no earlier step writes",
    ),
    "own name": ([Add(output="a", left=MATRIX, right="a")], [], "'a' reads 'a'.*no earlier step writes"),
    "later name": ([Add(output="a", left=MATRIX, right="square"), square], [], "order the steps"),
    "unknown residual": ([MatMul(output="a", left=MATRIX, right=MATRIX, subtract=("b",))], [], "reads 'b'"),
    "name written twice": ([square, square], [], "step 'square': the name is taken"),
    "input overwritten": ([Rescale(output=MATRIX, source=MATRIX)], [], "step 'M': the name is taken"),
    "name of a constant": (
        [Rescale(output="zeros", source=MATRIX)],
        [zeros(4)],
        "'zeros': the name is taken",
    ),
    "constants share a name": ([], [zeros(4), zeros(2)], "two inputs or constants share a name"),
    "constant named M": ([], [zeros(4, name=MATRIX)], "two inputs or constants share a name"),
    "inner sizes": (
        [top, MatMul(output="a", left="top", right="top")],
        [],
        r"'a': cannot multiply \[1,2,4\] by \[1,2,4\]; inner sizes",
    ),
    "numbers of blocks": (
        [
            Concat(output="two", sources=(MATRIX, MATRIX), axis=Axis.BLOCKS),
            MatMul(output="a", left="two", right=MATRIX),
        ],
        [],
        r"cannot multiply \[2,4,4\] by \[1,4,4\]",
    ),
    "residual of another shape": (
        [top, MatMul(output="a", left=MATRIX, right=MATRIX, add=("top",))],
        [],
        r"'a': shapes \[1,4,4\] and \[1,2,4\] differ",
    ),
    "sum of two shapes": ([top, Add(output="a", left="top", right=MATRIX)], [], "a sum needs equal ones"),
    "constant on the left": (
        [MatMul(output="a", left="zeros", right=MATRIX)],
        [zeros(4)],
        "constant 'zeros' may only feed a mask or a concat, or be the right operand of a product or sum",
    ),
    "product of constants": ([MatMul(output="a", left="zeros", right="zeros")], [zeros(4)], "may only feed"),
    "residual constant": (
        [MatMul(output="a", left=MATRIX, right="zeros", add=("zeros",))],
        [zeros(4)],
        "'a' adds residual terms to a product with the constant 'zeros'; add them in a step of their own",
    ),
    "constant that does not fit a product": (
        [MatMul(output="a", left=MATRIX, right="zeros")],
        [zeros(2)],
        r"cannot multiply \[1,4,4\] by \[1,2,4\]; inner sizes",
    ),
    "constant that does not fit a difference": (
        [Subtract(output="a", left=MATRIX, right="zeros")],
        [zeros(2)],
        r"shapes \[1,4,4\] and \[1,2,4\] differ",
    ),
    "constant multiplied elementwise": (
        [Multiply(output="a", left=MATRIX, right="zeros")],
        [zeros(4)],
        "may only feed a mask",
    ),
    "exponential of a constant": ([Exponential(output="a", source="zeros")], [zeros(4)], "may only feed"),
    "transposed constant": ([Transpose(output="a", source="zeros")], [zeros(4)], "may only feed a mask"),
    "difference of two shapes": ([top, Subtract(output="a", left=MATRIX, right="top")], [], "differ"),
    "rows that do not repeat": (
        [top, Multiply(output="a", left=MATRIX, right="top")],
        [],
        r"'a': cannot multiply \[1,4,4\] by \[1,2,4\] elementwise; sizes must agree, or one of",
    ),
    "blocks that do not repeat": (
        [
            Concat(output="two", sources=(MATRIX, MATRIX), axis=Axis.BLOCKS),
            Multiply(output="a", left="two", right=MATRIX),
        ],
        [],
        r"cannot multiply \[2,4,4\] by \[1,4,4\] elementwise",
    ),
    "constant in a sum": ([Add(output="a", left="zeros", right=MATRIX)], [zeros(4)], "may only feed a mask"),
    "constant rescaled": ([Rescale(output="a", source="zeros")], [zeros(4)], "may only feed a mask"),
    "constant sliced": ([Slice(output="a", source="zeros")], [zeros(4)], "may only feed a mask"),
    "mask of another size": (
        [Mask(output="a", source=MATRIX, constant="zeros")],
        [zeros(2)],
        r"'a': needs a tensor and a constant of its size, got \[1,4,4\] and \[1,2,4\]",
    ),
    "rows that a mask cannot repeat": (
        [top, Mask(output="a", source="top", constant="zeros")],
        [zeros(4)],
        r"of its size, got \[1,2,4\] and \[1,4,4\]",
    ),
    "mask that is no constant": (
        [Mask(output="a", source=MATRIX, constant=MATRIX)],
        [],
        "needs a tensor and a constant",
    ),
    "mask of a constant": (
        [Mask(output="a", source="zeros", constant="zeros")],
        [zeros(4)],
        "needs a tensor and a constant",
    ),
    "empty slice": (
        [Slice(output="a", source=MATRIX, rows=(2, 2))],
        [],
        r"range \(2, 2\) is empty or outside",
    ),
    "reversed slice": ([Slice(output="a", source=MATRIX, rows=(3, 1))], [], r"range \(3, 1\) is empty"),
    "slice beyond the end": ([Slice(output="a", source=MATRIX, columns=(2, 5))], [], r"outside \[0, 4\]"),
    "slice before the start": ([Slice(output="a", source=MATRIX, columns=(-1, 2))], [], r"outside \[0, 4\]"),
    "slice of missing blocks": ([Slice(output="a", source=MATRIX, blocks=(0, 2))], [], r"outside \[0, 1\]"),
    "concat of nothing": ([Concat(output="a", sources=(), axis=Axis.ROWS)], [], "at least one tensor source"),
    "concat of constants": (
        [Concat(output="a", sources=("zeros", "zeros"), axis=Axis.ROWS)],
        [zeros(2)],
        "'a': a concat needs at least one tensor source",
    ),
    "constant stacked": (
        [Concat(output="a", sources=(MATRIX, "zeros"), axis=Axis.BLOCKS)],
        [zeros(4)],
        "'a': constants cannot be stacked on the batch axis",
    ),
    "concat that does not fit": (
        [top, Concat(output="a", sources=(MATRIX, "top"), axis=Axis.COLUMNS)],
        [],
        r"cannot join \[1,4,4\], \[1,2,4\] along columns",
    ),
    "output too small": ([top], [], r"output 'top' must be a tensor of shape \[1,4,4\], got \[1,2,4\]"),
}


@pytest.mark.parametrize(("steps", "constants", "words"), WRONG.values(), ids=WRONG)
def test_a_step_that_does_not_fit_is_named(steps, constants, words):
    with pytest.raises(ProgramError, match=words):
        program(*steps, constants=tuple(constants))


@pytest.mark.parametrize(("output", "got"), [("nothing", "None"), ("zeros", "None")])
def test_the_output_must_be_a_tensor(output, got):
    with pytest.raises(ProgramError, match=f"output '{output}' must be a tensor .* got {got}"):
        program(square, constants=(zeros(4),), output=output)


@pytest.mark.parametrize("factor", [0.0, 0.1, math.nan, math.inf, 1e-31, 2.0**60, "1", None, True, 10**400])
def test_a_factor_is_a_float32_of_reasonable_magnitude(factor):
    with pytest.raises(ProgramError, match=r"step 'a': factor .* is not a float32 .*; round it to float32"):
        Rescale(output="a", source=MATRIX, factor=factor)


@pytest.mark.parametrize("factor", [1, -1.0, 2.0**-20, 3, 2.0**49])
def test_legal_factors_are_kept_as_floats(factor):
    step = Rescale(output="a", source=MATRIX, factor=factor)
    assert step.factor == factor
    assert isinstance(step.factor, float)


def test_factors_have_the_limits_of_scales():
    # A graph writes a factor as the scale of a constant.
    assert (MIN_FACTOR, MAX_FACTOR) == (MIN_SCALE, MAX_SCALE)


def test_an_unknown_axis_is_a_program_error():
    with pytest.raises(ProgramError, match="diagonal"):
        program(Concat(output="a", sources=(MATRIX,), axis="diagonal"))


def test_only_zero_constants_may_be_joined():
    ones = Constant(name="ones", rows=2, columns=4, ones=((0, 4), (0, 4)))
    with pytest.raises(ProgramError, match="ones"):
        program(top, Concat(output="a", sources=("top", "ones"), axis=Axis.ROWS), constants=(ones,))


@pytest.mark.parametrize(
    ("rows", "ones"),
    [(2, ((0, 1),)), (1, ((0, 1), (1, 2))), (1, ((-1, 2),)), (1, ((0, 5),)), (1, ((3, 2),))],
)
def test_a_constant_needs_one_legal_range_per_row(rows, ones):
    with pytest.raises(
        ProgramError,
        match=rf"'c': needs at least one row, and one column range inside \[0, 4\].*got {len(ones)}",
    ):
        Constant(name="c", rows=rows, columns=4, ones=ones)


def test_a_constant_holds_one_inside_its_ranges():
    constant = Constant(name="c", rows=3, columns=4, ones=((0, 0), (1, 3), (0, 4)))
    assert constant_matrix(constant).tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("chunk", [2, 4, 64, 1024])
def test_powers_of_two_are_chunk_sizes(chunk):
    check_chunk(chunk)
    assert program(chunk=chunk).shapes == {MATRIX: Shape(1, chunk, chunk)}


@pytest.mark.parametrize("chunk", [-2, 0, 1, 3, 48, 2048, 64.0, "64", None, True])
def test_other_chunk_sizes_are_refused(chunk):
    with pytest.raises(ProgramError, match=f"chunk {chunk!r} is not a power of two in \\[2, 1024\\]; pad"):
        program(chunk=chunk)


def test_shapes_follow_the_steps():
    tall = zeros(4, columns=2, name="tall")
    merged = program(
        top,
        corner,
        Concat(output="stack", sources=("corner", "corner", "corner"), axis=Axis.BLOCKS),
        Slice(output="pair", source="stack", blocks=(1, 3)),
        MatMul(output="wide", left="corner", right="top", add=("top",)),
        Slice(output="left", source=MATRIX, columns=(2, 4)),
        Concat(output="whole", sources=("tall", "left"), axis=Axis.COLUMNS),
        constants=(tall,),
    )
    shapes = {name: str(shape) for name, shape in merged.shapes.items()}
    assert shapes == {
        "M": "[1,4,4]",
        "top": "[1,2,4]",
        "corner": "[1,2,2]",
        "stack": "[3,2,2]",
        "pair": "[2,2,2]",
        "wide": "[1,2,4]",
        "left": "[1,4,2]",
        "whole": "[1,4,4]",
    }
    assert merged.tensors == tuple(shapes)


class Expressions(Evaluator[str]):
    def constant(self, constant, blocks):
        return f"{constant.name}*{blocks}"

    def matmul(self, step, left, right, add, subtract):
        return f"({left}@{right}{''.join(f'+{a}' for a in add)}{''.join(f'-{s}' for s in subtract)})"

    def add(self, step, left, right):
        return f"({left}+{right})"

    def subtract(self, step, left, right):
        return f"({left}-{right})"

    def multiply(self, step, left, right):
        return f"({left}*{right})"

    def exponential(self, step, source):
        return f"exp({source})"

    def rescale(self, step, source):
        return f"rescale({source})"

    def scale(self, step, source, vector):
        return f"{step.axis}({vector}*{source})"

    def mask(self, step, source, constant):
        return f"mask({source},{constant})"

    def transpose(self, step, source):
        return f"{source}^T"

    def slice(self, step, source):
        return f"slice({source})"

    def concat(self, step, sources):
        return f"{step.axis}[{','.join(sources)}]"


def test_evaluate_hands_every_step_its_operands_in_order():
    half = Slice(output="half", source=MATRIX, rows=(2, 4))
    steps = (
        top,
        half,
        Concat(output="rows", sources=("zeros", "half"), axis=Axis.ROWS),
        Mask(output="kept", source="rows", constant="mask"),
        Rescale(output="r", source="kept"),
        MatMul(output="p", left="r", right=MATRIX, add=("kept", "r"), subtract=(MATRIX,)),
        Add(output="s", left="p", right="r"),
        Multiply(output="h", left="s", right="r"),
        Exponential(output="e", source="h"),
        Transpose(output="t", source="e"),
        Subtract(output="d", left="t", right="mask"),
        MatMul(output="c", left="d", right="mask"),
    )
    tested = program(*steps, constants=(zeros(2), zeros(4, name="mask")))
    seen = {}
    result = tested.evaluate(Expressions(), {MATRIX: "x"}, seen.__setitem__)
    assert list(seen) == [MATRIX, *(step.output for step in steps)]
    assert seen["M"] == "x"
    kept = "mask(rows[zeros*1,slice(x)],mask*1)"
    assert seen["p"] == f"(rescale({kept})@x+{kept}+rescale({kept})-x)"
    assert seen["s"] == f"({seen['p']}+{seen['r']})"
    assert seen["t"] == f"exp(({seen['s']}*{seen['r']}))^T"
    assert result["S"] == seen["c"] == f"(({seen['t']}-mask*1)@mask*1)"


def test_constants_repeat_for_the_blocks_of_their_step():
    stack = Concat(output="stack", sources=(MATRIX, MATRIX), axis=Axis.BLOCKS)
    masked = Mask(output="masked", source="stack", constant="zeros")
    one = Mask(output="one", source=MATRIX, constant="zeros")
    seen = {}
    tested = program(stack, masked, one, constants=(zeros(4),))
    tested.evaluate(Expressions(), {MATRIX: "x"}, seen.__setitem__)
    assert seen["masked"] == "mask(blocks[x,x],zeros*2)"
    assert seen["one"] == "mask(x,zeros*1)"


class Token:
    pass


class Tokens(Expressions):
    def matmul(self, step, left, right, add, subtract):
        return Token()

    def add(self, step, left, right):
        return Token()


def test_values_are_dropped_once_no_later_step_needs_them():
    tested = neumann_doubling(32)
    references, alive = {}, {}

    def observe(name, value):
        references[name] = weakref.ref(value)
        alive[name] = {other for other, reference in references.items() if reference() is not None}

    result = tested.evaluate(Tokens(), {MATRIX: Token()}, observe)
    for i, step in enumerate(tested.steps):
        later = {name for other in tested.steps[i:] for name in other.inputs} | {tested.outputs[0].tensor}
        assert later & {MATRIX, *(s.output for s in tested.steps[:i])} <= alive[step.output]
        assert alive[step.output] <= later | {MATRIX, step.output}
    assert references[tested.outputs[0].tensor]() is result["S"]


def test_a_program_without_steps_returns_its_input():
    assert program().evaluate(Expressions(), {MATRIX: "x"}) == {"S": "x"}


@pytest.mark.parametrize("name", ["", "a\ud800", "tab\there", "x" * 201, "\x1b[31m"])
def test_names_must_be_short_and_printable(name):
    with pytest.raises(ProgramError, match="use 1 to 200, all printable"):
        program(Rescale(output=name, source=MATRIX))


def test_a_slice_needs_a_range():
    with pytest.raises(ProgramError, match="'a': a slice needs a range on at least one axis"):
        program(Slice(output="a", source=MATRIX))


def test_tensors_cannot_outgrow_m_without_end():
    steps = [Concat(output="x0", sources=(MATRIX, MATRIX), axis=Axis.ROWS)]
    steps += [Concat(output=f"x{i}", sources=(f"x{i - 1}",) * 2, axis=Axis.ROWS) for i in range(1, 40)]
    with pytest.raises(ProgramError, match=r"'x4': shape \[1,128,4\] has more than 16 times"):
        program(*steps)
    with pytest.raises(ProgramError, match="constant 'wide' is 1 x 1000000000"):
        program(constants=(Constant(name="wide", rows=1, columns=10**9, ones=((0, 0),)),))


def test_steps_and_residual_terms_have_limits():
    many = MatMul(output="a", left=MATRIX, right=MATRIX, add=(MATRIX,) * 9)
    with pytest.raises(ProgramError, match="more than 8 residual terms"):
        program(many)
    with pytest.raises(ProgramError, match="20001 steps; at most 20000 are legal"):
        program(*(Rescale(output=f"r{i}", source=MATRIX) for i in range(20001)))
