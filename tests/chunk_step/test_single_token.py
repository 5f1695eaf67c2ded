"""A step of one token on the grids of a chunk: the same integers, by fewer rows."""

from dataclasses import replace

import pytest
import torch
from step_plans import small_plan, step_plan

from qinvert import elimination, gated_delta_step, residuals_as_sums
from qinvert.chunk_step.ports import step_sizes
from qinvert.chunk_step.single_token import single_token_plan
from qinvert.formats import INT16

KEYS, VALUES, HEADS = 8, 12, 3
FORMS = [
    (decay, form, values_first, halves)
    for decay in ("scalar", "channel")
    for form in ("folded", "wy", "state")
    for values_first in (True, False)
    for halves in (False, True)
    if not (halves and form == "wy")
]


def plan_of(decay="scalar", form="folded", values_first=True, halves=False, **options):
    inverse = residuals_as_sums(elimination(8 if halves else 16))
    return step_plan(
        gated_delta_step(
            inverse, KEYS, VALUES, decay, form, values_first=values_first, halves=halves, **options
        )
    )


def token(decay, seed):
    draw = torch.Generator().manual_seed(seed)
    q, k = (
        torch.nn.functional.normalize(torch.randn(1, HEADS, 1, KEYS, generator=draw), dim=-1) for _ in "qk"
    )
    v = 0.3 * torch.randn(1, HEADS, 1, VALUES, generator=draw)
    g = -torch.rand(*((1, HEADS, 1) + ((KEYS,) if decay == "channel" else ())), generator=draw)
    beta = torch.rand(1, HEADS, 1, generator=draw)
    state = 0.3 * torch.randn(1, HEADS, KEYS, VALUES, generator=draw)
    return q * KEYS**-0.5, k, v, g, beta, state


@pytest.mark.parametrize(("decay", "form", "values_first", "halves"), FORMS)
def test_the_integers_are_those_of_the_chunk(decay, form, values_first, halves):
    plan = plan_of(decay, form, values_first, halves)
    single = single_token_plan(plan)
    assert step_sizes(single.program).chunk == (4 if halves else 2)
    for seed in range(4):
        given = token(decay, seed)
        for found, wanted in zip(single.step(*given), plan.step(*given), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("carried", ["error_feedback", "float_state"])
def test_what_products_read_of_a_state_stays_narrow(carried):
    plan = small_plan("npu-qdq-int16", wide=INT16, logs=INT16, **{carried: True}).layer()
    single = single_token_plan(plan)
    assert single.tensors["state/read"] == plan.tensors["state/read"]
    for seed in range(4):
        given = token("scalar", seed)
        for found, wanted in zip(single.step(*given), plan.step(*given), strict=True):
            assert torch.equal(found, wanted)


def test_another_grid_is_seen():
    plan = plan_of()
    v = plan.tensors["v_new"]
    moved = replace(plan, tensors={**plan.tensors, "v_new": replace(v, scale=v.scale * 1.5)})
    given = token("scalar", 0)
    assert not torch.equal(single_token_plan(moved).step(*given)[0], plan.step(*given)[0])


def test_a_larger_beta_keeps_its_proofs():
    plan = plan_of(max_beta=2.0)
    single = single_token_plan(plan)
    given = list(token("scalar", 1))
    given[4] = 2 * given[4]
    assert all(torch.equal(a, b) for a, b in zip(single.step(*given), plan.step(*given), strict=True))


def test_programs_of_other_names_have_no_shorter_form():
    plan = plan_of()
    assert single_token_plan(replace(plan, program=replace(plan.program, name="mine"))) is None
    unknown = replace(plan.program, parameters={**plan.program.parameters, "form": "another"})
    assert single_token_plan(replace(plan, program=unknown)) is None
