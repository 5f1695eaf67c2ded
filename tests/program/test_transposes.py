"""Transposes that meet: fewer steps, the same integers."""

import itertools

import pytest
import torch
from step_plans import step_inputs, step_plan

from qinvert import elimination, gated_delta_step
from qinvert.chunk_step.ports import step_sizes
from qinvert.chunk_step.window import window_plan
from qinvert.execution.simulator import evaluate
from qinvert.program.steps import Multiply, Rescale, Transpose
from qinvert.program.transposes import without_double_transposes

TURN = Transpose(output="a/turned", source="a")
BACK = Transpose(output="a/back", source="a/turned")


def test_a_transpose_of_a_transpose_is_what_was_given():
    use = Multiply(output="b", left="a/back", right="c")
    found = without_double_transposes([TURN, BACK, use], ["b"])
    assert found.steps == (Multiply(output="b", left="a", right="c"),)
    assert found.added == {}


def test_a_turned_product_of_something_turned_is_a_product_of_what_was_given():
    product = Multiply(output="p", left="a/turned", right="c", bound=1.0)
    back, factor = Transpose(output="b", source="p"), Rescale(output="c", source="d")
    found = without_double_transposes([factor, TURN, product, back], ["b"])
    assert found.steps == (
        factor,
        Transpose(output="c/turned", source="c"),
        Multiply(output="b", left="a", right="c/turned", bound=1.0),
    )
    assert found.added == {"c/turned": "c"}


def test_what_something_else_reads_stays():
    product = Multiply(output="p", left="a/turned", right="c")
    steps = [
        Rescale(output="c", source="d"),
        TURN,
        product,
        Transpose(output="b", source="p"),
        Multiply(output="d", left="p", right="p"),
    ]
    assert without_double_transposes(steps, ["b", "d"]).steps == tuple(steps)
    # An output keeps its name, and with it the step that writes it.
    assert without_double_transposes([TURN, BACK], ["a/back"]).steps == (TURN, BACK)


LAYOUTS = list(itertools.product([True, False], [True, False]))


@pytest.mark.parametrize(("stored", "given"), [pair for pair in LAYOUTS if pair[0] != pair[1]])
@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_keys_in_the_other_layout_give_the_same_integers(decay, stored, given, chunks):
    program = gated_delta_step(elimination(8), 4, 6, decay, keys_first=stored)
    plan = step_plan(program)
    sizes = step_sizes(program)
    inputs = step_inputs(sizes, 2, chunks)
    whole, other = (window_plan(plan, chunks, keys_first=first) for first in (stored, given))
    turned = {name: x.mT if name in sizes.key_ports else x for name, x in inputs.items()}
    expected, found = evaluate(whole, inputs), evaluate(other, turned)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def meeting(program):
    """Transposes of what was transposed, with products in between or without."""
    turned, found = set(), []
    for step in program.steps:
        if isinstance(step, Transpose) and step.source in turned:
            found.append(step.output)
        if isinstance(step, Transpose) or (isinstance(step, Multiply) and step.left in turned):
            turned.add(step.output)
    return found


@pytest.mark.parametrize("keys_first", [True, False])
def test_no_two_transposes_of_keys_meet_in_a_window(keys_first):
    plan = step_plan(gated_delta_step(elimination(8), 4, 6, keys_first=keys_first))
    window = window_plan(plan, 1, keys_first=not keys_first)
    assert meeting(window.program) == []
