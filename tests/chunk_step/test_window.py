"""Several chunks as one program: the same integers as chunk after chunk, whatever the layout."""

import pytest
import torch
from step_plans import small_plan, step_inputs

from qinvert import elimination
from qinvert.chunk_step.ports import step_sizes
from qinvert.chunk_step.window import MAX_CHUNKS, check_state_grids, window_plan
from qinvert.errors import PlanError, ProgramError
from qinvert.execution.simulator import evaluate
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization, Requantize

CHUNKS = 3


def one_after_the_other(plan, inputs):
    """o and the states of every chunk, by the plan of one chunk."""
    sizes, state, outputs, states = step_sizes(plan.program), inputs["state"], [], []
    last = 2 if sizes.values_first else 1
    axes = {"q": 1, "k": 1, "v": last, "beta": last, "g": 1 if sizes.per_channel else 2}
    for i in range(CHUNKS):
        part = {name: inputs[name].narrow(axis, i * sizes.chunk, sizes.chunk) for name, axis in axes.items()}
        found = evaluate(plan, {**part, "state": state})
        outputs.append(found["o"])
        states.append(found["state"])
        state = found["state"] * plan.tensors["state"].scale
    return torch.cat(outputs, last), states


@pytest.mark.parametrize("values_first", [True, False], ids=["values_first", "tokens_first"])
@pytest.mark.parametrize("form", ["folded", "wy", "state"])
@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_a_window_is_its_chunks_one_after_the_other(decay, form, values_first):
    plan = small_plan(decay=decay, form=form, values_first=values_first).layer()
    inputs = step_inputs(step_sizes(plan.program), 2, CHUNKS)
    o, states = one_after_the_other(plan, inputs)
    for turned in (values_first, not values_first):
        given = dict(inputs)
        if turned != values_first:
            given |= {name: inputs[name].mT for name in ("v", "state")}
        found = evaluate(window_plan(plan, CHUNKS, values_first=turned, every_state=True), given)
        assert list(found) == ["o", "state_1", "state_2", "state"]
        back = (lambda x: x) if turned == values_first else (lambda x: x.mT)
        assert torch.equal(back(found["o"]), o)
        for name, state in zip(("state_1", "state_2", "state"), states, strict=True):
            assert torch.equal(back(found[name]), state)


def test_one_chunk_in_its_own_layout_is_the_program_itself():
    plan = small_plan().layer()
    window = window_plan(plan, 1)
    assert window.program.steps == plan.program.steps
    assert window.program.inputs == plan.program.inputs
    assert dict(window.tensors) == dict(plan.tensors)


def test_chunks_share_their_constants():
    program = window_plan(small_plan().layer(), CHUNKS).program
    assert {c.name for c in program.constants} == {c.name for c in small_plan().layer().program.constants}


@pytest.mark.parametrize("chunks", [0, -1, 1.5, MAX_CHUNKS + 1])
def test_the_number_of_chunks_must_be_legal(chunks):
    with pytest.raises(ProgramError, match="chunks"):
        window_plan(small_plan().layer(), chunks)


def test_a_state_with_two_grids_is_refused():
    plan = small_plan().layer()
    check_state_grids(plan)
    grid = plan.tensors["state"]
    other = Quantization(format=grid.format, scale=2 * grid.scale)
    spoiled = LayerPlan(
        program=plan.program, tensors={**plan.tensors, "state": other}, requantize=plan.requantize
    )
    with pytest.raises(PlanError, match="one quantization") as error:
        window_plan(spoiled, 2)
    assert "\n" not in str(error.value)


def test_another_program_is_no_chunk_step():
    program = elimination(8)
    grid = Quantization(format=small_plan().layer().input.format, scale=2**-7)
    plan = LayerPlan(
        program=program, tensors=dict.fromkeys(program.tensors, grid), requantize=Requantize.DIVIDE
    )
    with pytest.raises(ProgramError, match="not a whole chunk step"):
        window_plan(plan, 2)
