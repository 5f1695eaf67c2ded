"""Elimination with radix 4: the same inverse, from sums whose unfinished columns no result depends on."""

from __future__ import annotations

from math import log2

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from keyed_systems import keyed

import qinvert
from qinvert.errors import ProgramError
from qinvert.execution.floating import FloatEvaluator
from qinvert.hardware import HARDWARE
from qinvert.methods import REGISTRY, elimination
from qinvert.plan.plan import LayerPlan
from qinvert.program.residual_sums import residuals_as_sums
from qinvert.program.steps import MatMul
from qinvert.stress import MAX_BETA, STRESS, stress_matrices
from qinvert.systems import Systems

SIDES = ["left", "right"]
every_side = pytest.mark.parametrize("side", SIDES)
CHUNKS = [2**k for k in range(1, 8)]
few = settings(max_examples=10)


def sums(chunk, side="right"):
    return residuals_as_sums(elimination(chunk, side, radix=4))


def tensors_of(program, lower) -> dict[str, torch.Tensor]:
    seen = {}
    program.run(lower.double(), dtype=torch.float64, observe=seen.__setitem__)
    return seen


@every_side
@pytest.mark.parametrize("options", [{}, {"tile": 8}, {"restart": 3}, {"corrections": 1}], ids=str)
@few
@given(data=st.data(), chunk=st.sampled_from(CHUNKS))
def test_it_gives_the_float64_inverse(data, chunk, options, side, solved):
    if chunk < 16:
        options = {}
    name = data.draw(st.sampled_from(["half_random", "small_random", "independent_keys", "wide_gates"]))
    lower = stress_matrices(name, 1, chunk, seed=data.draw(st.integers(0, 2**16)))
    program = elimination(chunk, side, radix=4, **options)
    exact = solved(lower)
    for form in (program, residuals_as_sums(program)):
        result = form.run(lower, dtype=torch.float64)
        assert torch.allclose(result, exact, rtol=0, atol=1e-11 * exact.abs().max())
    assert elimination(chunk, **program.parameters) == program


@every_side
@pytest.mark.parametrize("chunk", CHUNKS)
def test_two_levels_become_one_with_three_products_and_one_operand(chunk, side):
    program = elimination(chunk, side, radix=4)
    fours, twos = divmod(int(log2(chunk)), 2)
    products = [step for step in program.steps if isinstance(step, MatMul)]
    assert len(products) == program.cost().matmuls == 3 * fours + twos
    constant = {step.right if side == "right" else step.left for step in products}
    assert len(constant) == fours + twos
    assert len(program.partial_tensors) == 2 * fours
    assert not elimination(chunk, side).partial_tensors


def unfinished(name: str, side: str, chunk: int) -> torch.Tensor:
    """Where the tensor ``eliminate_SIZE/Z_j``, or its product, is not yet that of the last sum."""
    level, series = name.split("/")[:2]
    size, j = int(level.removeprefix("eliminate_")), int(series.removeprefix("Z_"))
    place = torch.arange(chunk) // (size // 4) % 4
    if side == "right":
        return (place < 3 - j).expand(chunk, chunk)
    return (place > j)[:, None].expand(chunk, chunk)


class Junk(FloatEvaluator):
    """Float64, with ``junk`` in place of some values of every partial tensor."""

    def __init__(self, batch, program, side, finished=False):
        super().__init__(batch, torch.float64, torch.device("cpu"))
        self.program, self.side, self.finished = program, side, finished

    def stored(self, name, values):
        if name in self.program.partial_tensors:
            where = unfinished(name, self.side, self.program.chunk)
            where = torch.tril(~where, -1) if self.finished else where
            values = torch.where(where, 100 * torch.randn(values.shape, dtype=torch.float64), values)
        return values


@every_side
@pytest.mark.parametrize("split", [False, True], ids=["products", "sums"])
@few
@given(data=st.data(), chunk=st.sampled_from([4, 8, 16, 32, 64]))
def test_what_is_unfinished_is_never_used(data, chunk, split, side):
    program = sums(chunk, side) if split else elimination(chunk, side, radix=4)
    lower, _ = data.draw(keyed(chunk))
    exact = tensors_of(program, lower[None])
    for name in program.partial_tensors:
        last = exact[name.replace("Z_1", "S").replace("Z_2", "S")]
        difference = (exact[name] - last).abs() * ~unfinished(name, side, chunk)
        assert difference.max() <= 1e-9, name
    found = program.evaluate(Junk(1, program, side), {"M": -lower[None]})["S"]
    # Bit for bit: the values that were replaced only ever met a zero, which 0 * 100 shows.
    assert torch.equal(found, exact[program.inverse_ports.result])


@every_side
def test_what_is_finished_is_used(side):
    program, lower = sums(16, side), stress_matrices("half_random", 1, 16).double()
    found = program.evaluate(Junk(1, program, side, finished=True), {"M": -lower})["S"]
    assert (found - tensors_of(program, lower)[program.inverse_ports.result]).abs().max() > 1


@every_side
@few
@given(data=st.data(), chunk=st.sampled_from([4, 16, 32]))
def test_other_tensors_keep_their_proof_and_sums_have_a_crude_one(data, chunk, side):
    lower, beta = data.draw(keyed(chunk))
    program, most = elimination(chunk, side, radix=4), float(beta.max())
    seen = tensors_of(program, lower[None])
    for step in program.steps:
        largest, half = float(seen[step.output].abs().max()), int(step.output.split("/")[0][10:]) // 4
        if step.bound is not None:
            assert largest <= step.bound * most + 1e-6, step.output
        else:
            square = 2 * half**2 * most**3 if step.output.endswith("Z_2") else 0
            assert largest <= most + 3 * half * most**2 + square + 1e-6, step.output


@pytest.mark.parametrize("name", STRESS)
def test_sums_exceed_both_ends_and_nothing_else_does(name):
    program, lower = elimination(64, "right", radix=4), stress_matrices(name, 8, 64)
    seen = tensors_of(program, lower)
    ends = max(lower.abs().max(), seen[program.inverse_ports.result].abs().max())
    for step in program.steps:
        partial = step.output in program.partial_tensors
        assert seen[step.output].abs().max() <= (3.4 if partial else 1.02) * ends, step.output


#: Stress sets on which unfinished values of radix 4 leave the grid of the results.
LEAVING = {"filled_blocks", "ones", "beta_ones", "repeated_keys", "correlated_keys", "wide_gates"}


def calibrated(program, name, target="npu-qdq-int8", **options) -> LayerPlan:
    lower = stress_matrices(name, 16, program.chunk, seed=1)
    options = {"bits": 8, "min_sqnr_db": 0, **options}
    return qinvert.calibrate(lower, method=program, target=target, **options).layer()


@pytest.mark.parametrize("name", ["filled_blocks", "correlated_keys", "beta_ones"])
def test_the_grid_fits_the_results_alone(name):
    program = sums(64)
    plan = calibrated(program, name)
    seen = tensors_of(program, stress_matrices(name, 16, 64, seed=1))
    kept = max(float(x.abs().max()) for n, x in seen.items() if n not in program.partial_tensors)
    assert len({grid.scale for grid in plan.tensors.values()}) == 1
    assert plan.output.scale * 127 <= 1.03 * kept
    assert max(float(seen[n].abs().max()) for n in program.partial_tensors) > 1.5 * kept


def with_ends(plan, lower, limit, unfinished=2) -> tuple[np.ndarray, int]:
    """Integers of S on one grid, where unfinished values end at ``limit``, and the largest of them."""
    scale, chunk, fmt = np.float32(plan.output.scale), plan.chunk, plan.output.format
    factor = np.float32(np.float32(scale * scale) / scale)
    i = np.arange(chunk)
    total = np.clip(np.rint(-lower.numpy() / scale), fmt.minimum, fmt.maximum)
    half, largest = 1, 0
    while half < chunk:
        block, outer = i // half, i // (4 * half)
        mask = (outer[:, None] == outer) & (block[:, None] > block)
        series = total
        for j in range(3):
            free = block % 4 < unfinished - j
            low, high = np.where(free, -limit, fmt.minimum), np.where(free, limit, fmt.maximum)
            product = (series @ (total * mask)).astype(np.float32) * factor
            series = np.clip(np.clip(np.rint(product), low, high) + total, low, high)
            largest = max(largest, int(np.abs(series).max()))
        total, half = series, 4 * half
    return total, largest


@pytest.mark.parametrize("name", STRESS)
def test_saturated_sums_give_the_bits_of_sums_without_ends(name):
    plan, lower = calibrated(sums(64), name), stress_matrices(name, 8, 64, seed=2)
    found, largest = with_ends(plan, lower, limit=2**40)
    expected = torch.from_numpy(found).float() * plan.output.scale + torch.eye(64)
    assert torch.equal(plan.inverse(lower), expected)
    # Some sums do leave the grid, and what they hold beyond it does not matter.
    assert largest > 128 or name not in LEAVING
    assert np.array_equal(with_ends(plan, lower, limit=0)[0], found)
    # One column of blocks more would matter.
    assert not np.array_equal(with_ends(plan, lower, limit=0, unfinished=3)[0], found)


def test_saturated_values_of_sums_are_no_fault():
    plan, lower = calibrated(sums(64), "filled_blocks"), stress_matrices("filled_blocks", 8, 64, seed=1)
    program = plan.program
    counts = qinvert.simulation.simulate_counting(plan, Systems(lower=lower))[1]
    assert not counts.keys() & program.partial_tensors
    assert plan.provenance["predicted_sqnr_db"] == pytest.approx(plan.provenance["expected_sqnr_db"], abs=1)
    proof = plan.proof()
    assert set(proof.partial) == program.partial_tensors
    assert proof.unproved == ()
    assert proof.bounded + len(proof.partial) == len(program.tensors)
    assert "partial: no result depends on what saturates in 12 tensors" in str(proof)
    assert "partial" not in str(calibrated(elimination(16), "half_random").proof())


@pytest.mark.parametrize("name", ["correlated_keys", "independent_keys", "half_random", "wide_gates"])
def test_int8_is_no_worse_than_with_radix_2(name):
    lower = stress_matrices(name, 16, 64, seed=2)
    pair = (residuals_as_sums(elimination(64)), sums(64))
    plans = [qinvert.calibrate(lower, method=p, target="npu-qdq-int8", bits=8, min_sqnr_db=0) for p in pair]
    two, four = (qinvert.simulate(plan, lower).layers["layer"].sqnr_db for plan in plans)
    assert four > two - 0.1


FORMS = {
    "sums": lambda chunk: sums(chunk),
    "left": lambda chunk: sums(chunk, "left"),
    "products": lambda chunk: elimination(chunk, "right", radix=4),
}
#: What chips get, at the size that matters most in every profile; other sizes and forms once or twice.
CASES = [
    *((profile, 64, "sums") for profile in ("npu-qdq-int8", "hexagon-uint8", "qlinear", "int-ops")),
    ("qlinear", 128, "sums"),
    ("npu-qdq-int8", 16, "left"),
    ("int-ops", 16, "products"),
]


@pytest.mark.parametrize(("profile", "chunk", "form"), CASES)
def test_onnxruntime_equals_the_simulator(profile, chunk, form, tmp_path):
    lower = torch.cat([stress_matrices(name, max(1, 32 // chunk), chunk, seed=3) for name in STRESS])
    plan = qinvert.calibrate(lower, method=FORMS[form](chunk), target=profile, bits=8, min_sqnr_db=0)
    qinvert.export(plan, tmp_path / "t.onnx", batch=len(lower))
    for result in qinvert.verify(tmp_path / "t.onnx", plan, lower):
        assert result.mismatches == 0


@every_side
@few
@given(data=st.data(), chunk=st.sampled_from([4, 8, 16, 32]))
def test_the_factored_form_gives_the_same_inverse(data, chunk, side, solved):
    lower, beta = data.draw(keyed(chunk))
    program = elimination(chunk, side, factored=True, radix=4)
    result = program.run(lower[None], dtype=torch.float64, beta=beta[None])
    assert torch.allclose(result[0], solved(lower), rtol=0, atol=1e-6)
    assert elimination(chunk, **program.parameters) == program


@pytest.mark.parametrize("radix", [0, 1, 3, 8, True, 2.5, None, "4"])
def test_other_radices_are_refused(radix):
    with pytest.raises(ProgramError, match=r"radix .* is unknown; use 2 or 4"):
        elimination(64, radix=radix)


def test_radix_2_is_the_default_and_has_no_name():
    assert elimination(64, radix=2) == elimination(64)
    assert elimination(64, "right", radix=4).title == "elimination(chunk=64, side=right, radix=4)"


@pytest.mark.parametrize("chunk", [32, 64, 128])
def test_planners_weigh_it_as_sums(chunk):
    method = REGISTRY["elimination"]
    assert method.on_chips is not None
    assert HARDWARE
    for offered in (method.candidates, method.on_chips):
        assert [p for p in offered(chunk) if "radix" in p.parameters] == [sums(chunk)]


@pytest.mark.parametrize("name", MAX_BETA)
def test_half_precision_holds_the_sums_of_keys(name, solved):
    lower = stress_matrices(name, 2, 128).half().float()
    result = elimination(128, "right", radix=4).run(lower, dtype=torch.float16).double()
    error = torch.linalg.matrix_norm(result - solved(lower)) / torch.linalg.matrix_norm(solved(lower))
    assert error.max() < 0.02
    assert torch.finfo(torch.float16).max > 2 + 3 * 32 * 2**2 + 2 * 32**2 * 2**3


def test_in_floats_a_sum_that_overflows_spoils_finished_columns(solved):
    # N31 = -N32 N21, so that T31 and T30 are 0, but N31 N10 = -81920 is part of Z_1.
    lower = torch.zeros(1, 64, 64)
    lower[0, 48:, 32:48], lower[0, 32:48, 16:32], lower[0, 16:32, :16] = -4.0, -4.0, -20.0
    lower[0, 48:, 16:32] = 256.0
    exact, program = solved(lower), elimination(64, "right", radix=4)
    assert exact.abs().max() < 2000
    assert torch.equal(program.run(lower).double(), exact)
    found = program.run(lower, dtype=torch.float16)
    assert found[0, 48:, 16:32].isnan().all()
    assert torch.equal(found[0, :48].double(), exact[0, :48])
