"""Subtract, Multiply, Exponential, Transpose and constants as operands: shapes, floats, supports, files."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinvert.errors import ProgramError
from qinvert.methods import REGISTRY, block_merge, elimination
from qinvert.program.assembly import rows_first
from qinvert.program.builder import StepBuilder
from qinvert.program.inlining import inlined, renamed
from qinvert.program.ports import MATRIX, Meaning, Port
from qinvert.program.program import Program
from qinvert.program.serialization import program_from_json, program_to_json
from qinvert.program.sparsity import SupportEvaluator, zero_diagonals
from qinvert.program.steps import (
    Axis,
    Concat,
    Constant,
    Mask,
    MatMul,
    Multiply,
    Shape,
    Slice,
    Subtract,
    Transpose,
)
from qinvert.program.transposition import transposed

CHUNK = 8
#: Every program that a method offers.
PROGRAMS = [program for method in REGISTRY.values() for program in method.candidates(CHUNK)]
FACTORED = [p for method in REGISTRY.values() if method.factored for p in method.factored(CHUNK, True)]
TRIANGLE = Constant(name="triangle", rows=4, columns=4, ones=tuple((0, i + 1) for i in range(4)))
WIDE = Constant(name="wide", rows=4, columns=3, ones=((0, 3), (1, 2), (0, 0), (2, 3)))


def port(name: str, rows: int, columns: int, tensor: str = "") -> Port:
    return Port(name=name, shape=Shape(1, rows, columns), tensor=tensor)


def built(inputs: dict[str, tuple[int, int]], build, *results: str) -> Program:
    """A program of plain ports whose steps ``build`` appends; it returns ``results``."""
    steps = StepBuilder()
    build(steps)
    ports = tuple(port(name, *shape) for name, shape in inputs.items())
    fields = {
        "name": "kinds",
        "chunk": 4,
        "inputs": ports,
        "constants": tuple(steps.constants.values()),
        "steps": tuple(steps.steps),
    }
    shapes = Program(outputs=ports[:1], **fields).shapes
    return Program(outputs=tuple(port(name, *shapes[name][1:]) for name in results), **fields)


def all_kinds(b: StepBuilder) -> None:
    b.subtract("difference", "a", TRIANGLE)
    b.multiply("by_row", "difference", "row")
    b.multiply("by_column", "column", "by_row")
    b.multiply("outer", "row", "column")
    b.multiply("by_number", "outer", "number")
    b.exponential("decay", "by_number")
    b.transpose("turned", "decay")
    b.matmul("sums", "turned", WIDE)
    b.mask("row_wide", "number", WIDE)
    b.mask("repeated", "row", TRIANGLE)
    b.add("total", "repeated", TRIANGLE)
    b.subtract("o", "total", "by_column")


INPUTS = {"a": (4, 4), "row": (1, 4), "column": (4, 1), "number": (1, 1)}
RESULTS = ("sums", "row_wide", "turned", "o")
TESTED = built(INPUTS, all_kinds, *RESULTS)


def values(seed: int = 0, count: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: -torch.rand(count, *shape, generator=generator).double() for name, shape in INPUTS.items()}


def matrix(constant: Constant) -> np.ndarray:
    return np.array([[start <= j < stop for j in range(constant.columns)] for start, stop in constant.ones])


def test_shapes_are_those_of_numpy():
    assert {name: tuple(TESTED.shapes[name][1:]) for name in TESTED.shapes if name not in INPUTS} == {
        "difference": (4, 4),
        "by_row": (4, 4),
        "by_column": (4, 4),
        "outer": (4, 4),
        "by_number": (4, 4),
        "decay": (4, 4),
        "turned": (4, 4),
        "sums": (4, 3),
        "row_wide": (4, 3),
        "repeated": (4, 4),
        "total": (4, 4),
        "o": (4, 4),
    }


def test_floats_are_those_of_numpy():
    given_values = values()
    a, row, column, number = (value.numpy() for value in given_values.values())
    found = TESTED.execute(given_values, dtype=torch.float64)
    turned = np.swapaxes(np.exp(row * column * number), 1, 2)
    expected = {
        "turned": turned,
        "sums": turned @ matrix(WIDE),
        "row_wide": number * matrix(WIDE),
        "o": row * matrix(TRIANGLE) + matrix(TRIANGLE) - column * ((a - matrix(TRIANGLE)) * row),
    }
    for name, value in expected.items():
        assert np.allclose(found[name].numpy(), value, rtol=0, atol=1e-15), name


def test_every_value_outside_a_support_is_zero():
    strict = Constant(name="strict", rows=4, columns=4, ones=tuple((0, i) for i in range(4)))

    def build(b):
        b.mask("lower", "a", strict)
        b.mask("row_lower", "row", strict)
        b.transpose("upper", "lower")
        b.multiply("both", "lower", "upper")
        b.multiply("scaled", "lower", "column")
        b.matmul("sums", "lower", TRIANGLE)
        b.subtract("less", "lower", "row_lower")
        b.exponential("full", "lower")
        b.add("o", "less", TRIANGLE)

    program = built(INPUTS, build, "o")
    supports, seen = {}, {}
    ones = {name: np.ones(shape, dtype=np.bool_) for name, shape in INPUTS.items()}
    program.evaluate(SupportEvaluator(), ones, supports.__setitem__)
    program.execute(values(count=50), dtype=torch.float64, observe=seen.__setitem__)
    for name, support in supports.items():
        # Not only is nothing outside: inside, something is different from zero.
        assert np.array_equal((seen[name] != 0).any(0).numpy(), support), name
    assert zero_diagonals(program) == {
        "lower",
        "row_lower",
        "upper",
        "both",
        "scaled",
        "sums",
        "less",
    }


def test_programs_of_all_kinds_come_back_from_files():
    document = program_to_json(TESTED)
    assert program_from_json(document) == TESTED
    kinds = {step["operation"] for step in document["steps"]}
    assert kinds == {"subtract", "multiply", "exponential", "transpose", "matmul", "mask", "add"}


def test_formulas_name_what_a_step_reads():
    text = str(TESTED)
    for formula in ("subtract(a, triangle)", "multiply(row, column)", "exponential(by_number)"):
        assert formula in text
    assert "turned @ wide" in text
    # A product with a constant costs what any product costs.
    assert TESTED.cost().macs == 4 * 4 * 3


# One program as a part of another.


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.title)
@pytest.mark.parametrize("copies", [1, 2])
def test_an_inlined_inverse_inverts_every_block(program, copies, solved):
    def build(b):
        sources = [f"m{i}" for i in range(copies)]
        stack = b.concat("stack", list(sources), Axis.BLOCKS) if copies > 1 else "m0"
        (result,) = b.inline(program, {MATRIX: stack}, "inverse/", copies).values()
        for i in range(copies):
            b.slice(f"o{i}", result, blocks=(i, i + 1))

    names = [f"o{i}" for i in range(copies)]
    outer = built({f"m{i}": (CHUNK, CHUNK) for i in range(copies)}, build, *names)
    lower = torch.tril(torch.rand(copies, 3, CHUNK, CHUNK).double() - 0.5, -1) / 4
    found = outer.execute({f"m{i}": -lower[i] for i in range(copies)}, dtype=torch.float64)
    for i, name in enumerate(names):
        alone = program.execute({MATRIX: -lower[i]}, dtype=torch.float64)
        assert torch.equal(found[name], next(iter(alone.values())))


def test_inlined_names_are_new_but_for_the_inputs():
    steps, constants, outputs = inlined(block_merge(8, 4), {MATRIX: "mine"}, "part/")
    written = {step.output for step in steps}
    assert all(name.startswith("part/") for name in written | {constant.name for constant in constants})
    assert {name for step in steps for name in step.inputs} <= written | {"mine"} | {
        constant.name for constant in constants
    }
    assert outputs.keys() == {"S"}
    assert set(outputs.values()) <= written


@pytest.mark.parametrize("step", [s for p in (*PROGRAMS, *FACTORED, TESTED) for s in p.steps][::7])
def test_renaming_there_and_back_changes_nothing(step):
    there = renamed(step, lambda name: f"x/{name}")
    assert all(name.startswith("x/") for name in (*there.inputs, there.output))
    assert renamed(there, lambda name: name.removeprefix("x/")) == step


# The same computation on transposed matrices.


def turned_values(program: Program, seed: int = 0) -> tuple[dict, dict]:
    """Inputs of a program, and those of its transposed form."""
    generator = torch.Generator().manual_seed(seed)
    one, other = {}, {}
    for given_port in program.inputs:
        value = torch.rand(4, *given_port.shape[1:], generator=generator).double() - 0.5
        if given_port.meaning in (Meaning.MATRIX, Meaning.QUOTIENT):
            value = torch.tril(value, -1)
        if given_port.meaning is Meaning.BETA:
            value = value.abs() + 0.1
        one[given_port.name] = value
        other[given_port.name] = value if given_port.name in program.vector_inputs else value.mT
    return one, other


@pytest.mark.parametrize("program", [*PROGRAMS, *FACTORED], ids=lambda program: program.title)
def test_the_transposed_program_of_every_method_returns_the_transposed_result(program):
    flipped = transposed(program)
    one, other = turned_values(program)
    results, seen, turned = [], {}, {}
    results.append(program.execute(one, dtype=torch.float64, observe=seen.__setitem__))
    results.append(flipped.execute(other, dtype=torch.float64, observe=turned.__setitem__))
    (plain,), (mirrored,) = (list(found.values()) for found in results)
    assert torch.allclose(mirrored, plain.mT, rtol=0, atol=1e-12)
    # Not only the result: every tensor holds the transposed one, but for parts of a Concat.
    parts = {name for s in program.steps if isinstance(s, Concat) for name in s.sources}
    for name in set(program.tensors) - set(program.vector_inputs) - parts:
        assert torch.allclose(turned[name], seen[name].mT, rtol=0, atol=1e-12), name
    assert flipped.cost().macs == program.cost().macs
    again = transposed(flipped)
    assert (again.steps, again.constants) == (program.steps, program.constants)


def test_new_kinds_are_transposed_too():
    def build(b):
        b.subtract("d", "a", TRIANGLE)
        b.multiply("m", "d", "row")
        b.exponential("e", "m")
        b.transpose("t", "e")
        b.mask("r", "column", TRIANGLE)
        b.matmul("o", "t", "r")

    program = built({"a": (4, 4), "row": (1, 4), "column": (4, 1)}, build, "o")
    flipped = transposed(program)
    one, other = turned_values(program)
    found, mirrored = (p.execute(v, dtype=torch.float64)["o"] for p, v in ((program, one), (flipped, other)))
    assert torch.allclose(mirrored, found.mT, rtol=0, atol=1e-12)


def test_a_constant_factor_cannot_become_a_left_operand():
    program = built({"a": (4, 4)}, lambda b: b.matmul("o", "a", TRIANGLE), "o")
    with pytest.raises(ProgramError, match="step 'o' multiplies by the constant 'triangle', which cannot"):
        transposed(program)


def test_columns_of_constants_must_be_one_range():
    gap = Constant(name="gap", rows=4, columns=4, ones=((0, 1), (1, 2), (0, 1), (0, 0)))
    program = built({"a": (4, 4)}, lambda b: b.mask("o", "a", gap), "o")
    with pytest.raises(ProgramError, match="constant 'gap' has a column whose ones are not one range; split"):
        transposed(program)


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), data=st.data())
def test_elementwise_products_repeat_exactly_what_numpy_repeats(rows, columns, data):
    sizes = st.sampled_from([1, rows]), st.sampled_from([1, columns, 3])
    left, right = (rows, columns), tuple(data.draw(size) for size in sizes)
    inputs = (port("a", *left), port("b", *right), port("zero", 1, 1))
    fields = {
        "name": "x",
        "chunk": 4,
        "inputs": inputs,
        "steps": (Multiply(output="o", left="a", right="b"),),
    }
    try:
        shape = np.broadcast_shapes(left, right)
    except ValueError:
        with pytest.raises(ProgramError, match="sizes must agree, or one of them must be 1"):
            Program(outputs=(port("o", 1, 1),), **fields)
        return
    assert tuple(Program(outputs=(port("o", *shape),), **fields).shapes["o"]) == (1, *shape)


def test_steps_that_share_a_stack_share_its_constant(solved):
    """A constant is repeated for all blocks of its step, in floating point as in files."""
    steps = (
        Concat(output="stack", sources=("a", "b"), axis=Axis.BLOCKS),
        Subtract(output="less", left="stack", right="triangle"),
        MatMul(output="sums", left="less", right="triangle"),
        Transpose(output="turned", source="sums"),
        Mask(output="kept", source="turned", constant="triangle"),
        Slice(output="o", source="kept", blocks=(1, 2)),
    )
    program = Program(
        name="stacks",
        chunk=4,
        inputs=(port("a", 4, 4), port("b", 4, 4)),
        outputs=(port("o", 4, 4),),
        constants=(TRIANGLE,),
        steps=steps,
    )
    given_values = {name: torch.rand(3, 4, 4).double() for name in "ab"}
    ones = matrix(TRIANGLE).astype(float)
    expected = np.swapaxes((given_values["b"].numpy() - ones) @ ones, 1, 2) * ones
    assert np.allclose(program.execute(given_values, dtype=torch.float64)["o"].numpy(), expected, atol=1e-14)


def test_an_eliminated_inverse_stays_one_when_it_is_transposed_twice():
    assert transposed(transposed(elimination(16))).steps == elimination(16).steps


# Blocks.


@pytest.mark.parametrize("program", [*PROGRAMS, *FACTORED], ids=lambda program: program.title)
def test_transposed_programs_join_rows_first(program):
    """As the programs of methods do: compilers get the other order wrong."""
    for tested in (program, transposed(program)):
        joins = {s.output: s for s in tested.steps if isinstance(s, Concat)}
        for s in joins.values():
            inner = [joins[name] for name in s.sources if name in joins]
            if s.axis == Axis.ROWS:
                assert sum(part.axis == Axis.COLUMNS for part in inner) <= 1, s.output


def blocks(b: StepBuilder) -> None:
    zeros = Constant(name="zeros", rows=2, columns=2, ones=((0, 0),) * 2)
    b.concat("upper", ["p", zeros, "q"], Axis.COLUMNS)
    b.concat("lower", ["q", "p", zeros], Axis.COLUMNS)
    b.concat("o", ["upper", "lower"], Axis.ROWS)


def test_rows_first_gives_the_same_matrix():
    program = built({"p": (2, 2), "q": (2, 2)}, blocks, "o")
    changed = dataclasses.replace(program, steps=rows_first(program))
    given_values = {name: torch.rand(2, 2, 2).double() for name in "pq"}
    expected, found = (p.execute(given_values, dtype=torch.float64)["o"] for p in (program, changed))
    assert torch.equal(found, expected)
    assert [s.axis for s in changed.steps] == [Axis.ROWS] * 3 + [Axis.COLUMNS]
    assert [s.output for s in changed.steps] == ["o/column_0", "o/column_1", "o/column_2", "o"]


@pytest.mark.parametrize(
    "build",
    [
        # Somebody else reads a row of blocks.
        lambda b: (blocks(b), b.transpose("reader", "upper")),
        # A column of nothing but zeros.
        lambda b: (
            b.concat("upper", ["p", Constant(name="z", rows=2, columns=2, ones=((0, 0),) * 2)], Axis.COLUMNS),
            b.concat("lower", ["q", Constant(name="z", rows=2, columns=2, ones=((0, 0),) * 2)], Axis.COLUMNS),
            b.concat("o", ["upper", "lower"], Axis.ROWS),
        ),
        # Rows that are cut in different places.
        lambda b: (
            b.slice("thin", "p", columns=(0, 1)),
            b.concat("wide", ["q", "thin"], Axis.COLUMNS),
            b.concat("upper", ["thin", "q"], Axis.COLUMNS),
            b.concat("o", ["wide", "upper"], Axis.ROWS),
        ),
        # A plain tensor among them.
        lambda b: (b.concat("upper", ["p"], Axis.COLUMNS), b.concat("o", ["upper", "q"], Axis.ROWS)),
    ],
)
def test_what_cannot_be_joined_rows_first_stays(build):
    program = built({"p": (2, 2), "q": (2, 2)}, build, "o")
    assert rows_first(program) == program.steps
