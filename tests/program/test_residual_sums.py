"""Residual terms as sums of their own: the same program, with proved ranges that hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inverse_programs import inverse_program
from keyed_systems import keyed

from qinvert.calibration.planning.scales import scale_groups
from qinvert.methods import REGISTRY, block_merge, elimination, neumann
from qinvert.program.ports import MATRIX
from qinvert.program.residual_sums import has_sums, residual_sums, residuals_as_sums
from qinvert.program.steps import Add, MatMul

CHUNK = 8
#: Every program that a method offers, in its fused form.
FUSED = [
    program
    for method in REGISTRY.values()
    for program in (*method.candidates(CHUNK), *(method.factored(CHUNK, True) if method.factored else ()))
]


def fused(*, add, subtract=(), left=MATRIX, right=MATRIX, output="P"):
    return MatMul(output=output, left=left, right=right, add=add, subtract=subtract)


def tensors_of(program, inputs):
    seen = dict(inputs)
    program.execute(inputs, dtype=torch.float64, observe=seen.__setitem__)
    return seen


@st.composite
def programs(draw):
    """Products and sums of whatever was written before, with up to three residual terms each."""
    steps, names = [], [MATRIX]
    for i in range(draw(st.integers(1, 4))):
        name, operand = f"x_{i}", st.sampled_from(names)
        terms = st.lists(operand, max_size=2).map(tuple)
        left, right = draw(operand), draw(operand)
        product = st.builds(fused, add=terms, subtract=terms, left=st.just(left), right=st.just(right))
        step = draw(product | st.just(Add(output="P", left=left, right=right)))
        steps.append(type(step)(**{n: getattr(step, n) for n in step.__slots__} | {"output": name}))
        names.append(name)
    return inverse_program(*steps, chunk=4)


@given(program=programs(), seed=st.integers(0, 2**32 - 1))
def test_in_exact_arithmetic_every_tensor_of_the_program_stays_what_it_is(program, seed):
    # Integers below 2^53 are exact in float64: degree 16 and entries of 1 stay far below.
    given = torch.randint(-1, 2, (3, 4, 4), generator=torch.Generator().manual_seed(seed)).double()
    changed = residuals_as_sums(program)
    before, after = (tensors_of(p, {MATRIX: torch.tril(given, -1)}) for p in (program, changed))
    assert all(torch.equal(after[name], values) for name, values in before.items())
    fuses = any(isinstance(s, MatMul) and s.add and not s.subtract for s in program.steps)
    assert has_sums(changed) == fuses == (changed is not program)


@pytest.mark.parametrize("program", FUSED, ids=lambda program: program.title)
def test_the_sums_are_found_again_and_no_others(program):
    changed = residuals_as_sums(program)
    old = set(program.steps)
    made = [step for step in changed.steps if isinstance(step, Add) and step not in old]
    assert residual_sums(changed) == made
    assert residual_sums(program) == []
    terms = sum(len(s.add) for s in program.steps if isinstance(s, MatMul) and not s.subtract)
    assert len(made) == terms
    assert all(not s.add or s.subtract for s in changed.steps if isinstance(s, MatMul))
    # A second time there is nothing left to do.
    assert residuals_as_sums(changed) is changed


def test_a_sum_of_a_product_that_was_a_step_before_is_none_of_them():
    own = (MatMul(output="own", left=MATRIX, right=MATRIX), Add(output="total", left="own", right=MATRIX))
    program = residuals_as_sums(inverse_program(*own, fused(add=(MATRIX,), right="total")))
    assert [step.output for step in residual_sums(program)] == ["P"]
    groups = scale_groups(program)
    assert groups["P"] == groups["P/product"] == groups[MATRIX]
    assert len({groups[name] for name in ("own", "total", "P")}) == 3


def test_terms_join_one_after_the_other_under_the_names_of_the_step():
    program = residuals_as_sums(inverse_program(fused(add=(MATRIX, MATRIX))))
    assert program.steps == (
        MatMul(output="P/product", left=MATRIX, right=MATRIX),
        Add(output="P/sum_1", left="P/product", right=MATRIX),
        Add(output="P", left="P/sum_1", right=MATRIX),
    )
    assert program.title == "test(chunk=4, residuals=sums)"


@pytest.mark.parametrize(
    "step", [fused(add=()), fused(add=(MATRIX,), subtract=(MATRIX,)), fused(add=(), subtract=(MATRIX,))]
)
def test_products_that_subtract_or_have_no_terms_stay_as_they_are(step):
    program = inverse_program(step)
    assert residuals_as_sums(program) is program
    corrected = elimination(CHUNK, corrections=1)
    kept = [s for s in corrected.steps if isinstance(s, MatMul) and s.subtract]
    assert kept
    assert set(kept) <= set(residuals_as_sums(corrected).steps)


def test_a_program_without_residual_terms_has_no_sums():
    program = neumann(CHUNK)
    assert residuals_as_sums(program) is program
    assert not has_sums(program)


@given(data=st.data(), program=st.sampled_from(FUSED))
def test_proved_ranges_hold_for_unit_keys(data, program):
    lower, beta = data.draw(keyed(CHUNK))
    program = residuals_as_sums(program)
    inputs = {MATRIX: -lower[None]}
    if program.inverse_ports.factored:
        floored = beta.clamp(min=2.0**-14)
        inputs = {program.inverse_ports.matrix: -(lower / floored[:, None])[None]}
        inputs[program.inverse_ports.beta] = floored[None, :, None]
    seen, largest = tensors_of(program, inputs), float(beta.max())
    sums = {step.output for step in residual_sums(program)}
    for step in program.steps:
        if step.bound is not None and (step.output in sums or step.output.endswith("/product")):
            limit = step.bound * (1.0 if program.inverse_ports.factored else largest)
            assert seen[step.output].abs().max() <= limit + 1e-6, step.output


def test_ranges_follow_from_those_of_the_step_and_its_terms():
    program = residuals_as_sums(elimination(CHUNK))
    bounds = {step.output: step.bound for step in program.steps}
    products = [step for step in program.steps if isinstance(step, MatMul)]
    assert [bounds[step.output] for step in products] == [2.0] * 3
    assert [bounds[step.output] for step in residual_sums(program)] == [1.0] * 3
    # A term without a range leaves the product without one.
    series = residuals_as_sums(block_merge(CHUNK, 8))
    assert bounds_of_sums(series)[-1] is not None
    assert {s.bound for s in series.steps if s.output.endswith("/product")} == {None}


def bounds_of_sums(program):
    return [step.bound for step in residual_sums(program)]
