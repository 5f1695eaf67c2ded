from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from keyed_systems import keyed

from qinvert.errors import ProgramError
from qinvert.methods import block_merge
from qinvert.methods._packed import bit_reversed
from qinvert.program.steps import MatMul
from qinvert.stress import MAX_BETA, stress_matrices

POWERS = [2**k for k in range(8)]
EVERY = [
    (chunk, base, tile)
    for chunk in POWERS[1:]
    for base in POWERS
    for tile in POWERS[1:]
    if base <= tile <= chunk
]


def relative_error(program, lower, dtype, exact) -> torch.Tensor:
    error = program.run(lower, dtype=dtype).double() - exact
    return torch.linalg.matrix_norm(error) / torch.linalg.matrix_norm(exact)


def tensors_of(program, lower) -> dict[str, torch.Tensor]:
    seen = {}
    program.run(lower.double(), dtype=torch.float64, observe=seen.__setitem__)
    return seen


@pytest.mark.parametrize(("chunk", "base", "tile"), EVERY)
def test_every_tile_gives_the_float64_inverse(chunk, base, tile, solved):
    lower = torch.cat([stress_matrices(name, 2, chunk) for name in ("small_random", "independent_keys")])
    program = block_merge(chunk, base, tile=tile)
    assert torch.allclose(program.run(lower, dtype=torch.float64), solved(lower), rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", ["packed", "masked"])
@pytest.mark.parametrize("base", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["half_random", "repeated_keys", "negative_eigenvalues", "filled_blocks"])
def test_small_bases_stay_exact_on_hard_matrices(layout, base, name, solved):
    lower = stress_matrices(name, 3, 64)
    exact = solved(lower)
    result = block_merge(64, base, layout).run(lower, dtype=torch.float64)
    assert torch.allclose(result, exact, rtol=0, atol=1e-11 * exact.abs().max())


@pytest.mark.parametrize("corrections", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["packed", "masked"])
def test_corrections_leave_an_exact_inverse_alone(corrections, layout, solved):
    lower = stress_matrices("half_random", 3, 32)
    program = block_merge(32, 4, layout, corrections=corrections)
    assert torch.allclose(program.run(lower, dtype=torch.float64), solved(lower), rtol=0, atol=1e-12)


def test_a_correction_removes_rounding_errors(solved):
    lower = stress_matrices("repeated_keys", 3, 64).half().float()
    exact = solved(lower)
    before = relative_error(block_merge(64, 8), lower, torch.float16, exact)
    after = relative_error(block_merge(64, 8, corrections=1), lower, torch.float16, exact)
    assert (after < before / 4).all()


def test_masked_and_packed_are_the_two_extreme_tiles():
    assert block_merge(32, 4, "masked") == block_merge(32, 4, tile=32)
    assert block_merge(32, 4, "packed") == block_merge(32, 4, tile=4)
    assert block_merge(32, 4, "masked") != block_merge(32, 4, "packed")


@pytest.mark.parametrize(("chunk", "base", "tile"), [key for key in EVERY if key[0] == 32])
def test_the_parameters_of_a_program_make_it_again(chunk, base, tile):
    program = block_merge(chunk, base, tile=tile, corrections=1)
    assert block_merge(chunk, **program.parameters) == program


@pytest.mark.parametrize("base", POWERS[1:7])
@pytest.mark.parametrize("layout", ["packed", "masked"])
def test_two_products_per_merge_and_per_doubling(base, layout):
    merges, doublings = (64 // base).bit_length() - 1, base.bit_length() - 2
    assert block_merge(64, base, layout).cost().matmuls == 2 * merges + 2 * doublings
    assert block_merge(64, base, layout, corrections=3).cost().matmuls == 2 * merges + 2 * doublings + 6


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32])
def test_the_halves_of_a_stack_are_the_halves_of_every_merge(count):
    order = bit_reversed(count)
    assert sorted(order) == list(range(count))
    while len(order) > 1:
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        assert [i + 1 for i in first] == second
        order = [i // 2 for i in first]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"chunk": 48}, "chunk 48 is not a power of two"),
        ({"chunk": 1}, "chunk 1 is not a power of two"),
        ({"base": 3}, r"base 3 is not a power of two in \[1, 64\]"),
        ({"base": 0}, "base 0 is not a power of two"),
        ({"base": 128}, "base 128 is not a power of two"),
        ({"base": 4.0}, r"base 4\.0 is not a power of two"),
        ({"base": True}, "base True is not a power of two"),
        ({"tile": 2}, r"tile 2 is not a power of two in \[4, 64\]"),
        ({"tile": 24}, "tile 24 is not a power of two"),
        ({"tile": 128}, "tile 128 is not a power of two"),
        ({"base": 1, "tile": 1}, r"tile 1 is not a power of two in \[2, 64\]"),
        ({"layout": "dense"}, "layout 'dense' is unknown; use packed or masked"),
        ({"layout": "masked", "tile": 16}, "layout 'masked' means tile=64; leave out one"),
        ({"corrections": -1}, r"corrections -1 is not in \[0, 4\]"),
        ({"corrections": 5}, "corrections 5 is not in"),
        ({"corrections": 1.0}, r"corrections 1\.0 is not in"),
        ({"corrections": True}, "corrections True is not in"),
    ],
)
def test_an_illegal_argument_is_named_with_what_is_legal(arguments, words):
    with pytest.raises(ProgramError, match=words):
        block_merge(**{"chunk": 64, **arguments})


def test_the_default_base_fits_every_chunk():
    assert block_merge(2).run(torch.zeros(2, 2)).tolist() == [[1, 0], [0, 1]]


@given(
    data=st.data(),
    chunk=st.sampled_from([4, 16, 32]),
    base=st.sampled_from([1, 4, 8]),
    tile=st.sampled_from([None, 8, 16]),
    corrections=st.integers(0, 1),
)
def test_proved_tensors_stay_below_beta_for_unit_keys(data, chunk, base, tile, corrections, solved):
    base = min(base, chunk)
    tile = None if tile is None or not base <= tile <= chunk else tile
    lower, beta = data.draw(keyed(chunk))
    program = block_merge(chunk, base, tile=tile, corrections=corrections)
    seen = tensors_of(program, lower)
    for step in program.steps:
        if step.bound is not None:
            assert seen[step.output].abs().max() <= step.bound * beta.max() + 1e-6, step.output
    assert (torch.tril(seen[program.inverse_ports.result][0], -1).abs() <= beta.unsqueeze(-1) + 1e-6).all()
    assert torch.allclose(
        seen[program.inverse_ports.result][0] + torch.eye(chunk), solved(lower), rtol=0, atol=1e-6
    )


@given(data=st.data(), chunk=st.sampled_from([4, 16, 32]))
def test_the_last_half_product_stays_below_beta_row_by_row(data, chunk):
    lower, beta = data.draw(keyed(chunk))
    half_product = tensors_of(block_merge(chunk, 1), lower)[f"merge_{chunk}/Y"][0]
    assert (half_product.abs() <= beta[chunk // 2 :, None] + 1e-6).all()


@pytest.mark.parametrize("name", MAX_BETA)
@pytest.mark.parametrize("layout", ["packed", "masked"])
def test_proved_tensors_stay_below_beta_on_every_stress_set(name, layout):
    program = block_merge(64, 1, layout)
    seen = tensors_of(program, stress_matrices(name, 4, 64))
    proved = [step for step in program.steps if step.bound is not None]
    assert len(proved) == len(program.steps)
    for step in proved:
        assert seen[step.output].abs().max() <= step.bound * MAX_BETA[name] + 1e-6, step.output


def test_powers_inside_a_base_block_are_not_proved_and_do_exceed_beta():
    program = block_merge(64, 16)
    seen = tensors_of(program, stress_matrices("repeated_keys", 1, 64))
    powers = [step for step in program.steps if "power" in step.output]
    assert len(powers) == 3
    assert all(step.bound is None for step in powers)
    assert max(seen[step.output].abs().max() for step in powers) > 100 * MAX_BETA["repeated_keys"]


def test_every_product_of_a_program_reads_what_it_adds():
    program = block_merge(64, 4, tile=16, corrections=1)
    products = [step for step in program.steps if isinstance(step, MatMul)]
    assert all({*p.add, *p.subtract} <= {p.left, p.right} for p in products)
