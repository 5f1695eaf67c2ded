from pathlib import Path

import numpy as np
import pytest
import torch

import qinvert
from qinvert.errors import InputError, PlanError, ProgramError
from qinvert.matrices import solve
from qinvert.methods import METHODS
from qinvert.stress import STRESS, from_keys, stress_matrices

GATES = Path(__file__).parents[3] / "shared" / "data" / "gates"


def report_of(plan, lower):
    return next(iter(qinvert.simulate(plan, lower).layers.values()))


def independent_sqnr(estimate, exact):
    """Of the strictly lower parts, by NumPy alone."""
    signal = np.linalg.norm(np.tril(exact, -1))
    return 20 * np.log10(signal / np.linalg.norm(np.tril(estimate - exact, -1)))


def independent_floor(lower):
    """Exact inverse of max-scaled int8 L on a max-scaled int8 grid, by NumPy alone."""
    exact = np.linalg.inv(np.eye(lower.shape[-1]) + lower)
    scale = np.abs(lower).max() / 127
    quantized = np.rint(lower / scale) * scale
    inverse = np.tril(np.linalg.inv(np.eye(lower.shape[-1]) + quantized), -1)
    scale = np.abs(np.tril(exact, -1)).max() / 127
    return independent_sqnr(np.clip(np.rint(inverse / scale), -128, 127) * scale, exact)


@pytest.mark.parametrize("chunk", [16, 64, 128])
@pytest.mark.parametrize("name", sorted(set(STRESS) - {"ones"}))
def test_int8_by_default_is_within_2_db_of_the_floor_on_unseen_matrices(name, chunk, record_property):
    lower = stress_matrices(name, 96, chunk, seed=5)
    if name == "outlier":
        lower[48, chunk // 2, chunk // 4] = 1.0
    plan = qinvert.calibrate(lower[:48])
    report = report_of(plan, lower[48:])
    record_property("loss_db", report.loss_db)
    assert report.loss_db < 2
    assert report.non_finite == 0
    if name != "filled_blocks":  # all entries equal: whether they fall on a grid is luck
        # Reciprocal scales and the calibration half's range cost a little of the ideal grids.
        assert report.sqnr_db > independent_floor(lower[48:].double().numpy()) - 3


def test_the_report_agrees_with_an_independent_computation():
    lower = stress_matrices("half_random", 32, 64)
    plan = qinvert.calibrate(lower)
    report = report_of(plan, lower)
    exact = np.linalg.inv(np.eye(64) + lower.double().numpy())
    estimate = plan.layer().inverse(lower.numpy()).astype(np.float64)
    assert report.sqnr_db == pytest.approx(independent_sqnr(estimate, exact), abs=1e-6)
    assert report.max_abs == pytest.approx(np.abs(estimate - exact).max())
    norms = np.linalg.norm(estimate - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
    assert report.worst_rel == pytest.approx(norms.max())
    assert report.floor_db == pytest.approx(independent_floor(lower.double().numpy()), abs=0.3)


@pytest.mark.parametrize("name", ["repeated_keys", "correlated_keys", "ones", "beta_ones"])
def test_auto_avoids_the_programs_that_fail(name):
    lower = stress_matrices(name, 32, 64)
    for method in (qinvert.block_merge(64, base=16), "neumann_doubling"):
        plan = qinvert.calibrate(lower, method=method)
        assert report_of(plan, lower).sqnr_db <= 0
        assert not plan.layer().provenance["meets_goal"]
    # Compared by multiply-accumulates, large blocks come first; on a chip other programs do.
    chosen = qinvert.calibrate(lower, target="qlinear").layer()
    assert chosen.program.name == "block_merge"
    assert chosen.program.parameters["base"] <= 4
    assert any("base=16" in reason for reason in chosen.provenance["rejected"])
    assert qinvert.calibrate(lower).layer().provenance["meets_goal"]


def test_auto_takes_short_series_where_nothing_grows_and_large_blocks_where_little_does():
    lower = stress_matrices("independent_keys", 32, 64)
    tiny = qinvert.calibrate(0.01 * lower, target="qlinear").layer()
    assert tiny.program.name == "neumann"
    small = qinvert.calibrate(lower, target="qlinear").layer()
    assert small.program.parameters["base"] == 16
    assert small.cost() > tiny.cost()


def test_a_correction_reaches_the_floor_where_merging_alone_does_not():
    lower = stress_matrices("beta_ones", 64, 64)
    plain = report_of(qinvert.calibrate(lower, method=qinvert.block_merge(64, base=4)), lower)
    corrected = report_of(
        qinvert.calibrate(lower, method=qinvert.block_merge(64, base=4, corrections=1)), lower
    )
    assert plain.loss_db > 6
    assert corrected.loss_db < 0.5


@pytest.mark.skipif(not GATES.is_dir(), reason="published gates are not beside this checkout")
@pytest.mark.parametrize("rho", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", ["Qwen3.5-0.8B", "Qwen3-Next"])
def test_int8_is_within_2_db_of_the_floor_on_real_gates_with_correlated_keys(name, rho):
    with np.load(GATES / f"{name}.npz") as gates:
        beta, g = (torch.from_numpy(gates[k]).T.reshape(-1, 64) for k in ("beta", "g"))
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(beta.shape[0], 1, 128, generator=generator)
    own = torch.randn(*beta.shape, 128, generator=generator)
    keys = torch.nn.functional.silu(rho**0.5 * shared + (1 - rho) ** 0.5 * own)
    lower = from_keys(torch.nn.functional.normalize(keys, dim=-1), beta, g)
    plan = qinvert.calibrate(lower[::2])
    report = report_of(plan, lower[1::2])
    assert report.loss_db < 2
    assert report.sqnr_db > 20


@pytest.mark.parametrize("method", METHODS)
def test_a_method_name_fixes_the_method(method):
    plan = qinvert.calibrate(stress_matrices("small_random", 8, 32), method=method)
    assert plan.layer().program.name == method
    assert plan.layer().program.chunk == 32


def test_every_power_has_a_scale_of_its_own():
    plan = qinvert.calibrate(stress_matrices("half_random", 16, 32), method="neumann").layer()
    scales = {plan.tensors[f"power_{k}"].scale for k in range(2, 16)}
    assert len(scales) == 14


def test_equal_input_gives_equal_plans_however_it_is_batched():
    lower = stress_matrices("correlated_keys", 40, 32)
    whole = qinvert.calibrate(lower)
    parts = qinvert.calibrate(list(lower.split(7)))
    assert whole.to_bytes() == qinvert.calibrate(lower).to_bytes()
    assert whole.layer().tensors == parts.layer().tensors


def test_power_of_two_scales_are_powers_of_two():
    plan = qinvert.calibrate(stress_matrices("correlated_keys", 16, 32), scales="pow2").layer()
    assert {np.frexp(q.scale)[0] for q in plan.tensors.values()} == {0.5}


def test_int4_is_coarser_but_legal():
    lower = stress_matrices("correlated_keys", 16, 32)
    plan = qinvert.calibrate(lower, bits=4, target="int-ops", min_sqnr_db=0)
    assert plan.layer().formats == "int4"
    assert 0 < report_of(plan, lower).sqnr_db < report_of(qinvert.calibrate(lower), lower).sqnr_db - 15


def test_a_missed_goal_is_marked():
    plan = qinvert.calibrate(stress_matrices("half_random", 16, 32), min_sqnr_db=90)
    assert plan.layer().provenance["meets_goal"] is False


def test_a_layer_of_zeros_inverts_to_the_identity():
    plan = qinvert.calibrate({"zero": torch.zeros(2, 16, 16)})
    assert torch.equal(plan.layer().inverse(torch.zeros(3, 16, 16)), torch.eye(16).expand(3, 16, 16))


@pytest.mark.parametrize("factor", [0.03, 1e-3, 1e-6])
def test_layers_of_small_entries_keep_their_resolution(factor, tmp_path):
    lower = factor * stress_matrices("correlated_keys", 32, 32)
    plan = qinvert.calibrate(lower)
    report = report_of(plan, lower)
    assert report.sqnr_db > 30
    assert report.sqnr_db > independent_floor(lower.double().numpy()) - 1
    qinvert.export(plan, tmp_path / "t.onnx")
    assert all(r.max_steps < 1.5 for r in qinvert.verify(tmp_path / "t.onnx", plan, lower))


def test_progress_is_told_every_batch():
    calls = []
    lower = stress_matrices("small_random", 6, 16)
    qinvert.calibrate([lower, lower], progress=lambda layer, count: calls.append((layer, count)))
    assert calls == [("layer", 6), ("layer", 12)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "magic"}, ProgramError, "unknown method 'magic'"),
        ({"bits": 5}, PlanError, "bits 5"),
        ({"bits": 4, "target": "npu-qdq-int8"}, PlanError, "takes int8"),
        ({"ranges": "widest"}, PlanError, "ranges 'widest' is unknown; use auto, max, percentile or mse"),
        ({"granularity": "column"}, PlanError, "granularity 'column'"),
        ({"granularity": "head"}, InputError, "without a head axis"),
        ({"target": "toaster"}, ValueError, "unknown profile 'toaster'"),
        ({"scales": "log"}, PlanError, "scales 'log' is unknown; use auto, float or pow2"),
        ({"min_sqnr_db": float("nan")}, PlanError, "min_sqnr_db"),
        ({"data": [1]}, InputError, "goes with a model"),
    ],
)
def test_illegal_options_are_refused_with_the_legal_ones(options, error, message):
    with pytest.raises(error, match=message):
        qinvert.calibrate(stress_matrices("small_random", 2, 16), **options)


def test_a_program_for_another_size_is_refused():
    with pytest.raises(ValueError, match="32"):
        qinvert.calibrate(stress_matrices("small_random", 2, 16), method=qinvert.block_merge(32))


def test_a_layer_that_changes_its_size_is_refused():
    with pytest.raises(ValueError, match="16"):
        qinvert.calibrate([stress_matrices("small_random", 2, 16), stress_matrices("small_random", 2, 32)])


def test_simulated_values_lie_on_the_output_grid():
    lower = stress_matrices("correlated_keys", 8, 32)
    plan = qinvert.calibrate(lower).layer()
    strict = torch.tril(plan.inverse(lower), -1)
    assert torch.equal(strict, torch.round(strict / plan.output.scale) * plan.output.scale)
    assert torch.allclose(solve(lower).float(), plan.inverse(lower), atol=0.1)


@pytest.mark.parametrize(("chunk", "deviation"), [(64, 1e3), (16, 1e30)])
def test_matrices_whose_inverse_no_grid_can_hold_are_refused_before_planning(chunk, deviation, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    lower = torch.tril(torch.randn(4, chunk, chunk, generator=generator) * deviation, -1)
    monkeypatch.setattr("qinvert.calibration.inverse_planning.choose", None)
    with pytest.raises(InputError, match=r"layer 'big': . reaches .*, but scales end at 1e\+15"):
        qinvert.calibrate({"big": lower})


def test_plans_of_large_inverses_can_be_saved():
    lower = torch.tril(torch.full((2, 4, 4), 1e5), -1)
    plan = qinvert.calibrate(lower, min_sqnr_db=0)
    assert qinvert.Plan.from_bytes(plan.to_bytes()) == plan
