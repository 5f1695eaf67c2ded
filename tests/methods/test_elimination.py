from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from keyed_systems import keyed

import qinvert
from qinvert.errors import ProgramError
from qinvert.methods import elimination
from qinvert.methods._blocks import merge_mask
from qinvert.methods._builder import Builder
from qinvert.methods._corrections import correct
from qinvert.profiles import PROFILES
from qinvert.program.program import Program
from qinvert.program.sparsity import constant_support
from qinvert.program.steps import MatMul, Scale
from qinvert.stress import MAX_BETA, STRESS, stress_matrices, unit_keys

POWERS = [2**k for k in range(8)]
SIDES = ["left", "right"]
EVERY = [
    (chunk, tile, restart)
    for chunk in POWERS[1:]
    for tile in POWERS[1:]
    if tile <= chunk
    for restart in (None, *range(1, tile.bit_length() - 1))
]
every_side = pytest.mark.parametrize("side", SIDES)


def tensors_of(program, lower, **inputs) -> dict[str, torch.Tensor]:
    seen = {}
    program.run(lower.double(), dtype=torch.float64, observe=seen.__setitem__, **inputs)
    return seen


def proved(program):
    return [step for step in program.steps if step.bound is not None]


@every_side
@pytest.mark.parametrize(("chunk", "tile", "restart"), EVERY)
def test_every_option_gives_the_float64_inverse(chunk, tile, restart, side, solved):
    lower = torch.cat([stress_matrices(name, 2, chunk) for name in ("small_random", "independent_keys")])
    program = elimination(chunk, side, tile, restart)
    assert torch.allclose(program.run(lower, dtype=torch.float64), solved(lower), rtol=0, atol=1e-11)


@every_side
@pytest.mark.parametrize("options", [{}, {"tile": 16}, {"restart": 3}, {"corrections": 2}], ids=str)
@pytest.mark.parametrize("name", STRESS)
def test_it_stays_exact_on_hard_matrices(name, options, side, solved):
    lower = stress_matrices(name, 3, 64)
    exact = solved(lower)
    result = elimination(64, side, **options).run(lower, dtype=torch.float64)
    assert torch.allclose(result, exact, rtol=0, atol=1e-11 * exact.abs().max())


def diagonal(matrices, size):
    block = torch.arange(matrices.shape[-1]) // size
    return matrices * (block[:, None] == block)


@pytest.mark.parametrize(("side", "restart"), [(s, r) for s in SIDES for r in (None, 1, 3)])
def test_every_level_is_the_inverse_of_its_blocks_times_m(side, restart, solved):
    lower = stress_matrices("negative_eigenvalues", 2, 32).double()
    seen = tensors_of(elimination(32, side, restart=restart), lower)
    for level in range(6):
        inverse = solved(diagonal(lower, 2**level))
        expected = -(inverse @ lower if side == "left" else lower @ inverse)
        if restart is not None and 0 < level < restart:
            expected = diagonal(expected, 2**level) - diagonal(lower, 2**restart) * (
                diagonal(torch.ones(32, 32), 2**level) == 0
            )
            finished = diagonal(seen[f"eliminate_{2**level}/S"], 2**level)
            assert torch.allclose(finished, diagonal(expected, 2**level), rtol=0, atol=1e-13)
        elif level:
            name = "restart" if level == restart else "eliminate"
            assert torch.allclose(seen[f"{name}_{2**level}/S"], expected, rtol=0, atol=1e-13)


@given(data=st.data(), chunk=st.sampled_from([8, 16]), last=st.integers(0, 3))
def test_the_two_sides_must_not_be_mixed(data, chunk, last, solved):
    # As in the method, but for the level that multiplies from the other side.
    builder = Builder(chunk)
    total, levels = builder.matrix, chunk.bit_length() - 1
    other = min(last, levels - 1)
    for k in range(levels):
        corner = builder.mask(f"N{k}", total, merge_mask(chunk, 2**k))
        operands = (total, corner) if k == other else (corner, total)
        total = builder.matmul(f"S{k}", *operands, add=(total,))
    seed = data.draw(st.integers(0, 2**16))
    lower = stress_matrices("half_random", 1, chunk, seed=seed).double()
    mixed = builder.program("mixed", {}, total).run(lower, dtype=torch.float64)
    # The first level alone does the same from both sides: no block is finished yet.
    assert torch.allclose(mixed, solved(lower), rtol=0, atol=1e-11) == (other == levels - 1 == 0)


def restarted_on_the_wrong_side(lower):
    blocks = diagonal(lower, 8)
    finished = torch.linalg.inv(torch.eye(32, dtype=torch.float64) + blocks) - torch.eye(32)
    rest = blocks - lower
    right = {"left": finished @ rest, "right": rest @ finished}
    return {side: finished + rest + product for side, product in right.items()}


def test_a_restart_of_one_side_is_none_of_the_other():
    lower = stress_matrices("half_random", 2, 32).double()
    expected = restarted_on_the_wrong_side(lower)
    for side, other in (SIDES, SIDES[::-1]):
        found = tensors_of(elimination(32, side, restart=3), lower)["restart_8/S"]
        assert torch.allclose(found, expected[side], rtol=0, atol=1e-13)
        assert not torch.allclose(found, expected[other], rtol=0, atol=1e-3)


@every_side
@pytest.mark.parametrize("chunk", POWERS[1:])
def test_log2_c_dense_products_and_as_many_masks(chunk, side):
    program = elimination(chunk, side)
    levels = chunk.bit_length() - 1
    cost = program.cost()
    assert (cost.matmuls, cost.depth, len(program.steps)) == (levels, levels, 2 * levels)
    assert cost.macs == levels * chunk**3


@pytest.mark.parametrize("corrections", [0, 1, 4])
@pytest.mark.parametrize(("tile", "restart"), [(64, None), (64, 4), (16, None), (16, 2), (2, None)])
def test_products_of_the_other_forms(tile, restart, corrections):
    products = elimination(64, tile=tile, restart=restart, corrections=corrections).cost().matmuls
    levels, merges = tile.bit_length() - 1, (64 // tile).bit_length() - 1
    assert products == levels + 2 * merges + (restart is not None) + 2 * corrections


@every_side
@pytest.mark.parametrize("options", [{}, {"tile": 8}, {"restart": 2}, {"tile": 16, "restart": 1}], ids=str)
def test_every_product_reads_what_it_adds(options, side):
    program = elimination(64, side, corrections=1, **options)
    products = [step for step in program.steps if isinstance(step, MatMul)]
    assert all({*p.add, *p.subtract} <= {p.left, p.right} for p in products)
    assert [p.add for p in products if p.output.startswith("eliminate")] == [
        (p.right if side == "left" else p.left,) for p in products if p.output.startswith("eliminate")
    ]


@pytest.mark.parametrize(("chunk", "tile", "restart"), [key for key in EVERY if key[0] == 32])
@every_side
def test_the_parameters_of_a_program_make_it_again(chunk, tile, restart, side):
    program = elimination(chunk, side, tile, restart, corrections=1)
    assert elimination(chunk, **program.parameters) == program


def test_titles_name_what_is_not_the_default():
    assert elimination(64).title == elimination(64, "left", 64).title == "elimination(chunk=64)"
    title = elimination(64, "right", 16, 2, 1).title
    assert title == "elimination(chunk=64, side=right, tile=16, restart=2, corrections=1)"


@every_side
def test_corrections_remove_rounding_errors(side, solved):
    lower = stress_matrices("wide_gates", 3, 64).half().float()
    exact = solved(lower)

    def error(corrections):
        result = elimination(64, side, corrections=corrections).run(lower, dtype=torch.float16)
        return torch.linalg.matrix_norm(result.double() - exact)

    assert error(1).sum() < error(0).sum() / 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"chunk": 48}, "chunk 48 is not a power of two"),
        ({"side": "top"}, "side 'top' is unknown; use left or right"),
        ({"side": None}, "side None is unknown"),
        ({"side": ["left"]}, r"side \['left'\] is unknown"),
        ({"tile": 1}, r"tile 1 is not a power of two in \[2, 64\]"),
        ({"tile": 24}, "tile 24 is not a power of two"),
        ({"tile": 128}, "tile 128 is not a power of two"),
        ({"tile": True}, "tile True is not a power of two"),
        ({"restart": 0}, r"restart 0 is not in \[1, 5\]"),
        ({"restart": 6}, r"restart 6 is not in \[1, 5\]"),
        ({"restart": True}, "restart True is not in"),
        ({"restart": 4, "tile": 16}, r"restart 4 is not in \[1, 3\]"),
        ({"restart": 1, "tile": 2}, "elimination inside 2 x 2 has one level; leave out restart"),
        ({"corrections": 5}, r"corrections 5 is not in \[0, 4\]"),
        ({"corrections": -1}, "corrections -1 is not in"),
        ({"corrections": 1.0}, r"corrections 1\.0 is not in"),
        ({"factored": True, "tile": 16}, "factored elimination is dense and has no restart, got tile 16"),
        ({"factored": True, "restart": 2}, "got tile 64 and restart 2; leave them out"),
    ],
)
def test_an_illegal_argument_is_named_with_what_is_legal(arguments, words):
    with pytest.raises(ProgramError, match=words):
        elimination(**{"chunk": 64, **arguments})


@given(
    data=st.data(),
    chunk=st.sampled_from([4, 16, 32]),
    side=st.sampled_from(SIDES),
    tile=st.sampled_from([None, 4, 16]),
    restart=st.integers(0, 4),
    corrections=st.integers(0, 1),
)
def test_proved_tensors_stay_below_beta_for_unit_keys(data, chunk, side, tile, restart, corrections, solved):
    tile = tile if tile is not None and tile <= chunk else chunk
    restart = restart if 0 < restart < tile.bit_length() - 1 else None
    lower, beta = data.draw(keyed(chunk))
    program = elimination(chunk, side, tile, restart, corrections)
    seen = tensors_of(program, lower)
    for step in proved(program):
        assert seen[step.output].abs().max() <= step.bound * beta.max() + 1e-6, step.output
        if tile == chunk:
            # Row by row, which also says why no level loses its smallest rows.
            assert (seen[step.output][0].abs() <= beta[:, None] + 1e-6).all(), step.output
    result = seen[program.inverse_ports.result][0] + torch.eye(chunk)
    assert torch.allclose(result, solved(lower), rtol=0, atol=1e-6)


@every_side
@pytest.mark.parametrize("name", STRESS)
@pytest.mark.parametrize("options", [{}, {"tile": 16}, {"restart": 4}], ids=str)
def test_no_tensor_exceeds_its_proof_nor_the_larger_end_on_any_stress_set(name, options, side):
    program, lower = elimination(64, side, **options), stress_matrices(name, 8, 64)
    seen = tensors_of(program, lower)
    assert len(proved(program)) == len(program.steps)
    ends = max(lower.abs().max(), seen[program.inverse_ports.result].abs().max())
    for step in program.steps:
        largest = seen[step.output].abs().max()
        assert largest <= 1.02 * ends, step.output
        if name in MAX_BETA:
            assert largest <= step.bound * MAX_BETA[name] + 1e-6, step.output


def test_keys_longer_than_one_leave_the_proved_range():
    lower = 1.5**2 * stress_matrices("correlated_keys", 1, 64)
    seen = tensors_of(elimination(64), lower)
    assert max(x.abs().max() for x in seen.values()) > 100 * MAX_BETA["correlated_keys"]


def test_only_residues_and_updates_of_corrections_have_no_proof():
    program = elimination(64, corrections=1)
    without = {step.output for step in program.steps} - {step.output for step in proved(program)}
    assert without == {"correction_1/R", "correction_1/update"}
    plan = qinvert.calibrate(stress_matrices("correlated_keys", 8, 64), method=elimination(64)).layer()
    proof = plan.proof()
    assert proof.unproved == ()
    assert proof.bounded == len(plan.program.tensors) == 13
    assert proof.accumulator_bound < 2**24


def beta_of(lower):
    return lower.abs().amax(-1).clamp_min(2**-14)


@every_side
@pytest.mark.parametrize("corrections", [0, 2])
@pytest.mark.parametrize("chunk", POWERS[1:])
def test_the_factored_form_gives_the_same_inverse(chunk, corrections, side, solved):
    lower = stress_matrices("correlated_keys", 2, chunk)
    program = elimination(chunk, side, corrections=corrections, factored=True)
    result = program.run(lower, dtype=torch.float64, beta=torch.ones(2, chunk))
    assert torch.allclose(result, solved(lower), rtol=0, atol=1e-11)
    assert elimination(chunk, **program.parameters) == program
    scales = [step for step in program.steps if isinstance(step, Scale)]
    assert len(scales) == chunk.bit_length() - 1 + 2 * corrections
    assert program.cost().matmuls == chunk.bit_length() - 1 + 2 * corrections


@given(data=st.data(), chunk=st.sampled_from([4, 16, 32]), side=st.sampled_from(SIDES))
def test_factored_tensors_stay_below_one(data, chunk, side, solved):
    lower, beta = data.draw(keyed(chunk))
    program = elimination(chunk, side, factored=True)
    seen = tensors_of(program, lower, beta=beta)
    assert len(proved(program)) == len(program.steps)
    for step in program.steps:
        limit = beta.max() if isinstance(step, Scale) else 1.0
        assert seen[step.output].abs().max() <= step.bound * limit + 1e-6, step.output
    assert torch.allclose(
        program.run(lower, dtype=torch.float64, beta=beta), solved(lower), rtol=0, atol=1e-6
    )


def test_the_factored_form_gains_where_beta_varies():
    keys = unit_keys(64, 64, 0.5, torch.Generator().manual_seed(1))
    beta = torch.rand(64, 64, generator=torch.Generator().manual_seed(2))
    lower = qinvert.stress.from_keys(keys, beta, torch.zeros(64, 64))
    plain, factored = (
        qinvert.simulate(qinvert.calibrate(source, method=program, bits=8, min_sqnr_db=0), source)
        for source, program in ((lower, elimination(64)), ((lower, beta), elimination(64, factored=True)))
    )
    assert factored.layers["layer"].sqnr_db > plain.layers["layer"].sqnr_db + 2.5


def sqnr(program, name, count=32):
    lower = stress_matrices(name, 2 * count, 64, seed=1)
    plan = qinvert.calibrate(lower[:count], method=program, bits=8, min_sqnr_db=0)
    return qinvert.simulate(plan, lower[count:]).layers["layer"]


#: int8 at C = 64, dB: dense from the left and from the right, with a restart at 4, tiles of 16.
INT8 = {
    "half_random": (30.7, 30.7, 31.3, 31.4),
    "small_random": (38.6, 38.6, 39.6, 39.9),
    "beta_ones": (38.7, 28.3, 37.4, 33.6),
    "filled_blocks": (41.0, 41.0, 41.0, 41.0),
    "repeated_keys": (32.7, 32.7, 32.6, 32.6),
    "correlated_keys": (29.7, 29.8, 30.7, 30.3),
    "independent_keys": (25.9, 25.8, 26.4, 26.6),
    "negative_eigenvalues": (24.1, 24.0, 25.1, 25.5),
    "wide_gates": (27.0, 26.9, 28.1, 28.3),
    "per_channel_decay": (27.0, 26.8, 28.0, 28.3),
    "zero_rows": (30.5, 30.3, 31.2, 31.2),
}


@pytest.mark.parametrize("name", INT8)
def test_int8_reaches_what_was_measured(name):
    forms = (elimination(64), elimination(64, "right"), elimination(64, restart=4), elimination(64, tile=16))
    found = [sqnr(form, name).sqnr_db for form in forms]
    assert found == pytest.approx(INT8[name], abs=0.5)


@pytest.mark.parametrize("name", STRESS)
def test_planned_int8_is_within_1_db_of_its_floor(name):
    lower = stress_matrices(name, 64, 64, seed=1)
    plan = qinvert.calibrate(lower[:32], method="elimination", bits=8)
    report = qinvert.simulate(plan, lower[32:]).layers["layer"]
    assert plan.layer().program.name == "elimination"
    assert report.floor_db - report.sqnr_db < 1
    assert report.non_finite == 0


def test_candidates_are_dense_or_on_tiles():
    titles = [program.title for program in qinvert.methods.REGISTRY["elimination"].candidates(16)]
    assert titles == ["elimination(chunk=16)", "elimination(chunk=16, corrections=1)"]


FORMS = {
    "left": lambda chunk: elimination(chunk),
    "right": lambda chunk: elimination(chunk, "right"),
    "corrected": lambda chunk: elimination(chunk, corrections=1),
    "tiled": lambda chunk: elimination(chunk, tile=8, corrections=1),
    "restarted": lambda chunk: elimination(chunk, "right", restart=2),
}
#: Every profile at every size; the sizes that take long in the forms that differ most.
CASES = [
    *((profile, 16, form) for profile in PROFILES for form in FORMS),
    *((profile, chunk, form) for profile in PROFILES for chunk in (32, 64) for form in ("left", "tiled")),
    *((profile, 128, "left") for profile in PROFILES),
]


@pytest.mark.parametrize(("profile", "chunk", "form"), CASES)
def test_onnxruntime_equals_the_simulator(profile, chunk, form, tmp_path):
    lower = torch.cat([stress_matrices(name, 128 // chunk, chunk, seed=3) for name in STRESS])
    # By QDQ, float scales round sums in the runtime's order; int4 ties show it in one value of a thousand.
    scales = "pow2" if profile == "npu-qdq-int4" else "auto"
    program = FORMS[form](chunk)
    plan = qinvert.calibrate(lower[::2], method=program, target=profile, scales=scales, min_sqnr_db=0)
    qinvert.export(plan, tmp_path / "t.onnx", batch=len(lower), chains=1)
    for result in qinvert.verify(tmp_path / "t.onnx", plan, lower):
        # int16 products by QDQ are rounded in float32 first, as those of every other method.
        share = 1e-3 if "int16" in plan.layer().formats else 0
        assert result.mismatches <= share * result.values


@every_side
@pytest.mark.parametrize(
    "profile", ["int-ops", "int-ops-x86", "qlinear", "qlinear-uint8", "npu-qdq-int8", "npu-qdq-uint8"]
)
def test_factored_graphs_equal_the_simulator(profile, side, tmp_path):
    keys = unit_keys(16, 16, 0.5, torch.Generator().manual_seed(1))
    beta = torch.rand(16, 16, generator=torch.Generator().manual_seed(2))
    lower = qinvert.stress.from_keys(keys, beta, torch.zeros(16, 16))
    program = elimination(16, side, corrections=1, factored=True)
    plan = qinvert.calibrate((lower, beta), method=program, target=profile, bits=8, min_sqnr_db=0)
    qinvert.export(plan, tmp_path / "t.onnx", batch=4)
    for result in qinvert.verify(tmp_path / "t.onnx", plan, lower, beta=beta):
        assert result.mismatches == 0


@every_side
def test_hexagons_rounding_is_simulated(side):
    lower = torch.cat([stress_matrices(name, 2, 16, seed=3) for name in STRESS])
    layer = qinvert.calibrate(lower, method=elimination(16, side), bits=8, min_sqnr_db=0).layer()
    ours, theirs = layer.inverse(lower), layer.inverse(lower, rounding="hexagon")
    steps = ((ours - theirs).abs() / layer.output.scale).round()
    assert 0 < steps.max() <= 8
    assert (steps > 0).double().mean() < 0.1


def test_corrections_are_those_of_block_merge():
    merge, ours = qinvert.block_merge(16, corrections=2), elimination(16, corrections=2)
    shared = [[s for s in program.steps if "correction_2/" in s.output] for program in (merge, ours)]
    assert shared[0] == shared[1]
    assert correct(Builder(16), "S", 0) == "S"
    assert isinstance(ours, Program)


def test_masks_hold_one_quarter_of_every_block():
    for half in (1, 4, 16):
        support = constant_support(merge_mask(32, half))
        row, column = np.nonzero(support)
        assert len(row) == 32 // (2 * half) * half**2
        assert ((row - column > 0) & (row // (2 * half) == column // (2 * half))).all()
        assert ((row // half % 2 == 1) & (column // half % 2 == 0)).all()
