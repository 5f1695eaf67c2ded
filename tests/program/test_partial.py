"""Partial steps: what they may not be, how they travel, and that planning gives them no room."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from inverse_programs import inverse_program

import qinvert
from qinvert.calibration.planning.clipping import RangeRule, clip_ranges
from qinvert.calibration.planning.grids import growth, unproved, widened
from qinvert.errors import PlanError, ProgramError
from qinvert.formats import INT8
from qinvert.kernels.generator import integer_kernel
from qinvert.methods import elimination
from qinvert.program.residual_sums import residuals_as_sums
from qinvert.program.serialization import program_from_json, program_to_json
from qinvert.program.steps import Add, Constant, Mask, MatMul
from qinvert.stress import stress_matrices
from qinvert.systems import Systems

#: Rows 0 and 1 of columns 0 and 1.
KEPT = Constant(name="kept", rows=4, columns=4, ones=((0, 2), (0, 2), (0, 0), (0, 0)))


def chain(**first):
    """``c = M + (M M + M)``, the sum in the middle partial."""
    return inverse_program(
        MatMul(output="a", left="M", right="M", partial=True, **first),
        Add(output="b", left="a", right="M", partial=True),
        Add(output="c", left="b", right="M"),
    )


def test_a_partial_step_has_no_bound():
    for step in (MatMul, Add):
        assert not step(output="x", left="M", right="M", bound=1.0).partial
        with pytest.raises(ProgramError, match=r"step 'x' is partial and has the bound 1\.0; leave out"):
            step(output="x", left="M", right="M", bound=1.0, partial=True)


def test_an_output_is_not_partial():
    program = chain()
    assert program.partial_tensors == {"a", "b"}
    with pytest.raises(ProgramError, match="output 'c' is partial, so that some of its values may be wrong"):
        replace(program, steps=(*program.steps[:-1], replace(program.steps[-1], partial=True)))


def test_a_file_names_partial_steps_and_no_others():
    program = chain()
    document = json.loads(json.dumps(program_to_json(program)))
    assert [step.get("partial") for step in document["steps"]] == [True, True, None]
    assert program_from_json(document) == program
    assert "partial" not in json.dumps(program_to_json(elimination(64)))
    document["steps"][0]["partial"] = 1
    with pytest.raises(PlanError, match="partial"):
        program_from_json(document)


def test_products_and_sums_of_a_partial_step_are_partial():
    program = inverse_program(
        MatMul(output="a", left="M", right="M", add=("M", "M"), partial=True),
        MatMul(output="b", left="a", right="M", add=("M",)),
    )
    split = residuals_as_sums(program)
    assert split.partial_tensors == {"a/product", "a/sum_1", "a"}
    assert residuals_as_sums(elimination(64, "right")).partial_tensors == set()


def test_a_partial_tensor_takes_the_range_of_what_reads_it():
    ranges = {"M": 1.0, "a": 9.0, "b": 8.0, "c": 2.0}
    found = widened(chain(), ranges)
    assert found == {"M": 1.0, "a": 2.0, "b": 2.0, "c": 2.0}
    complete = replace(chain(), steps=tuple(replace(step, partial=False) for step in chain().steps))
    assert widened(complete, ranges)["a"] == 9.0
    assert (unproved(chain()), growth(chain(), ranges)) == ([], 0.0)
    assert growth(complete, ranges) == 4.5


def test_a_partial_tensor_that_nothing_reads_keeps_its_range():
    program = inverse_program(
        MatMul(output="a", left="M", right="M", partial=True), Add(output="b", left="M", right="M")
    )
    assert widened(program, {"M": 1.0, "a": 3.0, "b": 2.0})["a"] == 3.0


def test_of_several_readers_the_widest_counts():
    program = inverse_program(
        MatMul(output="a", left="M", right="M", partial=True),
        Mask(output="b", source="a", constant="kept"),
        Add(output="c", left="a", right="M"),
        constants=(KEPT,),
    )
    assert widened(program, {"M": 1.0, "a": 9.0, "b": 3.0, "c": 2.0})["a"] == 3.0


@pytest.mark.parametrize("rule", [RangeRule.MSE, RangeRule.PERCENTILE])
@pytest.mark.parametrize("split", [False, True])
def test_clipping_does_not_look_beyond_that_range(rule, split):
    program, lower = elimination(16, "right", radix=4), stress_matrices("beta_ones", 8, 16)
    program = residuals_as_sums(program) if split else program
    seen = {}
    program.run(lower, observe=lambda name, x: seen.update({name: float(x.abs().max())}))
    ranges = widened(program, seen)
    clipped = clip_ranges(program, ranges, Systems(lower=lower), dict.fromkeys(program.tensors, INT8), rule)
    partial = program.partial_tensors
    assert max(ranges[name] for name in partial) < 0.7 * max(seen[name] for name in partial)
    assert all(clipped[name] <= ranges[name] for name in partial)
    # Their own group, in products, still has values from which to choose.
    assert all(clipped[name] > 0.3 * ranges[name] for name in program.tensors)


def test_kernels_do_not_count_what_saturates_there():
    program = residuals_as_sums(elimination(32, "right", radix=4))
    lower = stress_matrices("filled_blocks", 4, 32)
    plan = qinvert.calibrate(lower, method=program, bits=8, min_sqnr_db=0).layer()
    counted = integer_kernel(plan, count=True).counted
    assert set(counted) == set(program.tensors) - program.partial_tensors
    seen = {}
    qinvert.simulation.simulate_inverse(plan, Systems(lower=lower), lambda name, q: seen.update({name: q}))
    assert any((seen[name].abs() >= 127).any() for name in program.partial_tensors)
    assert torch.equal(plan.inverse(lower), plan.inverse(lower.double()))
