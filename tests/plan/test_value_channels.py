"""What value channels refuse, and that the rule commutes with what they do."""

from __future__ import annotations

import pytest
import torch

from qinvert.errors import PlanError
from qinvert.plan.value_channels import MAX_EXPONENT, ValueChannels

REFUSED = {
    "no head": (),
    "no channel": ((),),
    "rows of two lengths": ((1, 2), (1,)),
    "a fraction": ((0.5,),),
    "a truth value": ((True,),),
    "a text": (("1",),),
    "too large": ((MAX_EXPONENT + 1,),),
    "too small": ((0, -MAX_EXPONENT - 1),),
    "too many heads": ((0,),) * 4097,
}


@pytest.mark.parametrize("exponents", REFUSED.values(), ids=REFUSED)
def test_exponents_that_are_not_legal_are_refused(exponents):
    with pytest.raises(PlanError, match="integers of at most 60 in magnitude, one row"):
        ValueChannels(exponents=exponents)


def test_a_rotation_needs_a_power_of_two():
    with pytest.raises(PlanError, match=r"value_size 3 is not a power of two in .*; leave out the rotation"):
        ValueChannels(exponents=((0, 0, 0),), rotated=True)
    assert ValueChannels(exponents=((0, 0, 0, 0),), rotated=True).value_size == 4


@pytest.mark.parametrize(
    ("exponents", "rotated", "nothing"),
    [(((0, 0),), False, True), (((0, 1),), False, False), (((0, 0),), True, False)],
)
def test_what_changes_nothing(exponents, rotated, nothing):
    assert ValueChannels(exponents=exponents, rotated=rotated).changes_nothing == nothing


def test_heads_have_rows_of_their_own_or_share_one():
    channels = ValueChannels(exponents=((0, 1, 2), (3, 4, MAX_EXPONENT)))
    assert (channels.heads, channels.value_size) == (2, 3)
    assert ValueChannels(exponents=((-MAX_EXPONENT,),)).heads == 1


def test_powers_of_two_commute_with_the_step_bit_for_bit():
    from qinvert.chunk_step.gated_delta_step import gated_delta_step
    from qinvert.methods import elimination

    program = gated_delta_step(elimination(8), 4, 4)
    generator = torch.Generator().manual_seed(0)
    given = {
        port.name: torch.rand(3, *port.shape[1:], generator=generator).double() / 2 for port in program.inputs
    }
    given["g"] = -given["g"]
    factors = 2.0 ** torch.tensor([[3.0], [-7.0], [0.0], [60.0]], dtype=torch.float64)
    plain = program.execute(given, dtype=torch.float64)
    scaled = program.execute(
        given | {name: given[name] / factors for name in ("v", "state")}, dtype=torch.float64
    )
    for name, value in plain.items():
        assert torch.equal(scaled[name] * factors, value)
