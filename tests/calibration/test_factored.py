from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from inverse_programs import inverse_program

import qinvert
from qinvert import recall
from qinvert.calibration.observation.statistics import LayerObserver, MatrixSample
from qinvert.calibration.planning.rounding_noise import settle_residues
from qinvert.calibration.planning.scales import scale_groups
from qinvert.calibration.planning.sensitivity import measure_sensitivities
from qinvert.calibration.sources import open_source, open_systems
from qinvert.errors import InputError, ProgramError
from qinvert.formats import INT8, INT8X2, INT16
from qinvert.matrices import SolvedInverse
from qinvert.methods import block_merge
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.steps import MIN_BETA, Axis, Constant, Mask, MatMul, Scale
from qinvert.simulation import simulate_inverse
from qinvert.stress import from_keys, unit_keys
from qinvert.systems import Systems

GATES = Path(__file__).parents[3] / "shared" / "data" / "gates"


def keyed(count, seed=0, chunk=32, top=1.0, leading=()):
    generator = torch.Generator().manual_seed(seed)
    keys = unit_keys(count, chunk, 0.5, generator)
    beta = top * torch.rand(count, chunk, generator=generator)
    lower = from_keys(keys, beta, -0.01 * torch.rand(count, chunk, generator=generator))
    return lower.reshape(*leading, -1, chunk, chunk), beta.reshape(*leading, -1, chunk)


LOWER, BETA = keyed(8, chunk=8)
ZEROS = Constant(name="zeros", rows=32, columns=32, ones=((0, 0),) * 32)


class Reader:
    def __init__(self, items):
        self.items = iter(items)

    def get_next(self):
        return next(self.items, None)


# Sources.


def collect(source):
    return [(name, systems.lower, systems.beta) for name, systems in open_systems(source)]


@pytest.mark.parametrize(
    "source",
    [
        {"layer": (LOWER, BETA)},
        (LOWER, BETA),
        (LOWER.numpy(), BETA.numpy()),
        iter([(LOWER, BETA)]),
        [{"layer": (LOWER, BETA)}],
        Reader([(LOWER, BETA)]),
        Reader([{"layer": (LOWER.numpy(), BETA)}]),
    ],
    ids=lambda source: type(source).__name__,
)
def test_a_pair_carries_beta_wherever_matrices_are_legal(source):
    ((name, lower, beta),) = collect(source)
    assert name == "layer"
    assert torch.equal(lower, LOWER)
    assert torch.equal(beta, BETA)


def test_files_pair_arrays_by_name(tmp_path):
    arrays = {"a": LOWER.numpy(), "a.beta": BETA.numpy(), "b": LOWER[:2].numpy()}
    np.savez(tmp_path / "l.npz", **arrays)
    (first, lower, beta), (second, _, none) = collect(tmp_path / "l.npz")
    assert (first, second, none) == ("a", "b", None)
    assert torch.equal(lower, LOWER)
    assert torch.equal(beta, BETA)
    assert [name for name, _ in open_source(tmp_path / "l.npz")] == ["a", "b"]


def test_a_beta_without_matrices_is_taken_for_matrices_and_refused(tmp_path):
    np.savez(tmp_path / "l.npz", **{"a.beta": BETA.numpy()})
    with pytest.raises(InputError, match=r"L of layer 'a\.beta' is not strictly lower"):
        collect(tmp_path / "l.npz")


def test_matrices_alone_have_no_beta_and_two_of_them_are_no_pair():
    assert [beta for _, _, beta in collect([LOWER, LOWER])] == [None, None]
    assert [beta for _, _, beta in collect((LOWER, LOWER[:3]))] == [None, None]
    ((_, stacked, none),) = collect([(LOWER.numpy(), LOWER.numpy())])
    assert (tuple(stacked.shape), none) == ((2, 8, 8, 8), None)


def test_an_illegal_beta_is_named_by_its_layer():
    with pytest.raises(InputError, match=r"beta of layer 'a' holds values that are not in \[0, 2\]"):
        collect({"a": (LOWER, BETA - 1)})
    with pytest.raises(InputError, match="beta of layer 'a' has shape"):
        collect({"a": (LOWER, BETA[:, :4])})


# Calibration.


@pytest.mark.parametrize("method", ["auto", "block_merge"])
def test_a_factored_plan_takes_beta_and_says_so(method):
    plan = qinvert.calibrate({"a": (LOWER, BETA)}, method=method, factored=True)
    assert plan.provenance["factored"] is True
    assert plan.layer().program.inverse_ports.beta == "beta"
    assert plan.layer().program.parameters["factored"] is True
    assert set(plan.layer().tensors) == set(plan.layer().program.tensors)
    assert "beta" in plan.layer().tensors
    assert qinvert.Plan.from_bytes(plan.to_bytes()) == plan


def test_a_plain_plan_neither_needs_nor_mentions_beta():
    with_beta, without = qinvert.calibrate((LOWER, BETA)), qinvert.calibrate(LOWER)
    assert with_beta.to_bytes() == without.to_bytes()
    assert "factored" not in with_beta.provenance


@pytest.mark.parametrize("how", [{"factored": True}, {"method": block_merge(8, factored=True)}])
def test_a_source_without_beta_is_refused_with_the_layer(how):
    with pytest.raises(
        InputError, match=r"rows of L by beta of layer 'b', which is missing; .* shape \[8, 8\]"
    ):
        qinvert.calibrate({"a": (LOWER, BETA), "b": LOWER}, **how)
    plan = qinvert.calibrate({"a": (LOWER, BETA)}, factored=True)
    with pytest.raises(InputError, match="beta of layer 'a', which is missing"):
        qinvert.simulate(plan, {"a": LOWER})


def test_methods_without_a_factored_form_are_refused():
    with pytest.raises(ProgramError, match="'neumann' has no factored form; use auto or block_merge"):
        qinvert.calibrate((LOWER, BETA), method="neumann", factored=True)
    with pytest.raises(ProgramError, match="unknown method 'nothing'"):
        qinvert.calibrate((LOWER, BETA), method="nothing", factored=True)
    with pytest.raises(ProgramError, match="does not take beta; build it with factored=True"):
        qinvert.calibrate((LOWER, BETA), method=block_merge(8), factored=True)


def test_corrections_are_for_targets_that_take_their_residual():
    qdq, integer = (
        qinvert.calibrate(keyed(64), factored=True, bits=8, target=target).layer()
        for target in ("npu-qdq-int8", "int-ops")
    )
    assert qdq.requantize is Requantize.MULTIPLIER
    assert "corrections" not in qdq.program.parameters
    assert integer.program.parameters["corrections"] == 1


def test_beta_that_is_seen_in_batches_gives_the_same_plan():
    lower, beta = keyed(40)
    whole = qinvert.calibrate((lower, beta), factored=True)
    parts = qinvert.calibrate(list(zip(lower.split(7), beta.split(7), strict=True)), factored=True)
    assert whole.layer().tensors == parts.layer().tensors


@pytest.mark.parametrize(
    ("ranges", "bits", "least"),
    [
        ("max", 4, 6),
        ("max", 8, 31),
        ("max", "8x2", 72),
        ("max", 16, 77),
        ("mse", 8, 31),
        ("percentile", 8, 29),
    ],
)
def test_every_format_and_rule_is_planned(ranges, bits, least):
    plan = qinvert.calibrate(keyed(64), factored=True, ranges=ranges, bits=bits, min_sqnr_db=0)
    report = qinvert.simulate(plan, keyed(64, seed=1)).layers["layer"]
    assert least < report.sqnr_db <= report.floor_db


def test_heads_get_their_own_beta():
    lower, beta = keyed(24, leading=(2, 3))
    beta[:, 1] *= 0.1
    lower[:, 1] *= 0.1
    plan = qinvert.calibrate({"a": (lower, beta)}, granularity="head", factored=True)
    assert list(plan.layers) == ["a/head_0", "a/head_1", "a/head_2"]
    scales = [layer.tensors["beta"].scale for layer in plan.layers.values()]
    assert scales[1] < 0.11 * scales[0]
    report = qinvert.simulate(plan, {"a": (lower, beta)})
    assert report.worst_sqnr_db > 34


# Observation.


def test_ranges_are_those_of_the_divided_matrices():
    lower, beta = keyed(200, chunk=16)
    beta[3, 5], lower[3, 5] = 1e-9, 0
    program = block_merge(16, factored=True)
    observer = LayerObserver([program], capacity=8, seed=0)
    for part in zip(lower.split(60), beta.split(60), strict=True):
        observer.update(Systems(lower=part[0], beta=part[1]))
    ranges = observer.ranges(program)
    k = lower.numpy() / np.maximum(beta.numpy(), MIN_BETA)[..., None]
    # Of every matrix, not only of those that programs ran on.
    assert observer.observed < observer.matrices
    assert ranges["M"] == pytest.approx(abs(k).max(), rel=1e-6)
    assert ranges["beta"] == float(beta.max())
    inside = np.arange(16)[:, None] // 2 == np.arange(16) // 2
    assert ranges["merge_4/S"] <= abs(lower.numpy() * inside).max()


def test_scaled_tensors_leave_room_for_the_largest_entry_under_the_largest_beta():
    lower, beta = keyed(64, top=0.25)
    plan = qinvert.calibrate((lower, beta), factored=True).layer()
    largest = plan.ranges["M"] * plan.ranges["beta"]
    for name in ("merge_4/S", "merge_4/V", "merge_32/S"):
        assert plan.ranges[name] == pytest.approx(largest)
    assert plan.ranges["merge_32/W"] >= plan.ranges["M"]


def test_a_sample_keeps_every_matrix_with_its_beta():
    lower, beta = keyed(300, chunk=8)
    sample = MatrixSample(20, seed=0)
    for part in zip(lower.split(70), beta.split(70), strict=True):
        sample.update(Systems(lower=part[0], beta=part[1]))
    assert sample.systems.beta.shape == (20, 8)
    for matrix, row in zip(sample.systems.lower, sample.systems.beta, strict=True):
        (index,) = (beta == row).all(-1).nonzero()[0]
        assert torch.equal(lower[index], matrix)


@pytest.mark.parametrize("fmt", [INT8, INT16], ids=str)
def test_noise_of_one_grid_is_that_of_rounding_it_alone(fmt, solved):
    lower, beta = keyed(8)
    program = block_merge(32, factored=True)
    coarse = {name: Quantization(format=fmt, scale=float(np.float32(1 / 127))) for name in program.tensors}
    noise = measure_sensitivities(program, [coarse], Systems(lower=lower, beta=beta)).noise
    b = np.maximum(beta.double().numpy(), MIN_BETA)
    exact = np.tril(solved(lower).numpy(), -1) / b[..., None]
    rounded = np.round(exact * 127) / 127
    assert noise["merge_32/W", fmt.name] == pytest.approx(
        (((rounded - exact) * b[..., None]) ** 2).sum(), rel=0.02
    )
    # Rounding beta alone moves S by a few parts in a thousand, never by nothing.
    assert 0 < noise["beta", fmt.name] < 0.2 * noise["merge_32/W", fmt.name]


def test_the_sum_of_noises_predicts_the_simulation_without_shared_grids():
    lower, beta = keyed(32)
    plan = qinvert.calibrate((lower, beta), factored=True, target="int-ops", bits=8).layer()
    simulated = qinvert.simulate(
        qinvert.Plan(layers={"layer": plan}, target="int-ops"), (lower, beta)
    ).layers["layer"]
    assert plan.provenance["predicted_sqnr_db"] == pytest.approx(simulated.sqnr_db, abs=1)
    assert plan.provenance["expected_floor_db"] == pytest.approx(simulated.floor_db, abs=0.5)


def test_residues_of_a_correction_are_found():
    lower, beta = keyed(32)
    program = block_merge(32, factored=True, corrections=1)
    observer = LayerObserver([program], capacity=32, seed=0)
    observer.update(Systems(lower=lower, beta=beta))
    before = observer.ranges(program)
    formats = dict.fromkeys(program.tensors, INT8)
    after = settle_residues(program, before, Systems(lower=lower, beta=beta), formats)
    assert before["correction_1/R"] < 1e-5
    assert 0.01 < after["correction_1/R"] < 0.5
    assert {name for name in before if before[name] != after[name]} == {
        "correction_1/R",
        "correction_1/update",
    }


def scales_only(*more, output):
    rows = Scale(output="rows", source="M", vector="beta", axis=Axis.ROWS)
    return inverse_program(rows, *more[1:], chunk=32, factored=True, output=output, constants=more[:1])


def test_both_inputs_belong_to_what_no_algorithm_can_avoid():
    lower, beta = keyed(8)
    program = block_merge(32, factored=True)
    grids = dict.fromkeys(program.tensors, Quantization(format=INT8, scale=2.0**-7))
    noise = measure_sensitivities(program, [grids], Systems(lower=lower, beta=beta))
    ends = {*noise.inputs.values(), noise.output}
    groups = scale_groups(program)
    assert ends == {groups["M"], groups["beta"], groups["merge_32/W"]}


def test_the_dropped_product_of_low_planes_is_noise():
    lower, beta = keyed(8)
    program = scales_only(ZEROS, output="rows")
    step = 2.0**-15
    grids = {name: Quantization(format=INT8X2, scale=step) for name in program.tensors}
    noise = measure_sensitivities(program, [grids], Systems(lower=lower, beta=beta)).noise
    b = np.maximum(beta.double().numpy(), MIN_BETA)[..., None]
    k = -lower.double().numpy() / b
    low_k, low_b = ((np.rint(x / step) + 128) % 256 - 128 for x in (k, b))
    kept = k * b - low_k * low_b * step**2
    error = (np.rint(kept / step) * step - k * b) * b
    assert noise["rows", "int8x2"] == pytest.approx((error**2).sum(), rel=0.03)


def test_roundings_of_scales_leave_residues():
    lower, beta = keyed(8)
    both, columns, again = (
        Scale(output=output, source=source, vector="beta", axis=axis)
        for output, source, axis in (
            ("rows_first", "rows", Axis.COLUMNS),
            ("columns", "M", Axis.COLUMNS),
            ("columns_first", "columns", Axis.ROWS),
        )
    )
    zero = Mask(output="zero", source="rows", constant="zeros")
    residue = MatMul(output="r", left="zero", right="zero", add=("rows_first",), subtract=("columns_first",))
    program = scales_only(ZEROS, both, columns, again, zero, residue, output="rows")
    before = dict.fromkeys(program.tensors, 1.0) | {"r": 1e-7}
    after = settle_residues(
        program, before, Systems(lower=lower, beta=beta), dict.fromkeys(program.tensors, INT8)
    )
    # Each way rounds twice: up to two steps apart, times the margin.
    assert 2 / 127 < after["r"] <= 4 * 2 / 127


# Models.


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("transformers")
    return recall.load_model()


def test_the_chunk_rule_hands_beta_over_in_chunks():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 70, 3, 16, generator=generator) for _ in range(3))
    beta, g = torch.rand(2, 70, 3, generator=generator), -0.1 * torch.rand(2, 70, 3, generator=generator)
    seen = []

    def inverse(chunks):
        seen.append((chunks.lower, chunks.beta))
        return SolvedInverse(chunks.lower)

    arguments = {"query": q, "key": k, "value": v, "g": g, "beta": beta, "chunk_size": 32}
    result, _ = qinvert.chunk_gated_delta_rule(**arguments, chunk_inverse=inverse)
    expected, _ = qinvert.chunk_gated_delta_rule(**arguments)
    assert torch.equal(result, expected)
    ((lower, rows),) = seen
    assert lower.shape[:-1] == rows.shape == (2, 3, 3, 32)
    padded = np.pad(beta.numpy(), [(0, 0), (0, 26), (0, 0)]).transpose(0, 2, 1).reshape(2, 3, 3, 32)
    assert np.array_equal(rows.numpy(), padded)


def test_captured_beta_belongs_to_the_captured_matrices(model):
    tokens = recall.sequences(2, seed=3)
    pairs = list(qinvert.capture(model, tokens))
    largest = 0.0
    found = qinvert.capture_details(model, tokens, details=("beta",))
    for item, (other, same) in zip(found, pairs, strict=True):
        lower, beta = item.lower, item.beta
        assert item.layer == other
        assert torch.equal(lower, same)
        assert beta.shape == lower.shape[:-1]
        # Unit keys: what is left of an entry without beta is a decayed cosine.
        assert (lower.abs() <= beta.unsqueeze(-1) * (1 + 1e-4)).all()
        largest = max(largest, float((lower.abs().amax(-1) / beta.clamp(min=1e-3)).max()))
    assert largest > 0.9


def test_a_factored_plan_runs_a_model(model):
    seen, unseen = recall.sequences(4), recall.sequences(2, seed=3)
    plan = qinvert.calibrate(model, seen, factored=True)
    assert all(layer.program.inverse_ports.factored for layer in plan.layers.values())
    assert qinvert.simulate(plan, model, unseen).worst_sqnr_db > 25
    result = qinvert.evaluate(model, plan, unseen, score=recall.accuracy)
    assert result.score == 1.0
    assert result.kl < 0.01
    heads = qinvert.calibrate(model, seen, factored=True, granularity="head")
    assert qinvert.evaluate(model, heads, unseen, score=recall.accuracy).score == 1.0
    layer = next(iter(plan.layers.values()))
    single = qinvert.evaluate(model, layer, unseen)
    assert single.kl != result.kl


def test_the_model_sees_what_the_simulator_computes(model, monkeypatch):
    tokens = recall.sequences(1, seed=3)
    plan = qinvert.calibrate(model, tokens, factored=True)
    calls = []
    original = LayerPlan.inverse

    def recorded(self, lower, beta):
        calls.append((self, lower, beta, original(self, lower, beta)))
        return calls[-1][-1]

    monkeypatch.setattr(LayerPlan, "inverse", recorded)
    with qinvert.patched(model, plan), torch.no_grad():
        model(input_ids=tokens)
    assert len(calls) == 2
    for layer, lower, beta, result in calls:
        assert torch.equal(simulate_inverse(layer, Systems(lower=lower, beta=beta)), result)


# Published gates.


@pytest.mark.skipif(not GATES.is_dir(), reason="published gates are not beside this checkout")
@pytest.mark.parametrize(("name", "gain"), [("Qwen3.5-0.8B", 3.0), ("Qwen3-Next", 1.5)])
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_real_gates_gain_decibels_too(name, gain, rho, capsys):
    with np.load(GATES / f"{name}.npz") as gates:
        beta, g = (torch.from_numpy(gates[k]).T.reshape(-1, 64)[::4] for k in ("beta", "g"))
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(beta.shape[0], 1, 128, generator=generator)
    own = torch.randn(*beta.shape, 128, generator=generator)
    keys = torch.nn.functional.silu(rho**0.5 * shared + (1 - rho) ** 0.5 * own)
    lower = from_keys(torch.nn.functional.normalize(keys, dim=-1), beta, g)
    seen, unseen = (lower[::2], beta[::2]), (lower[1::2], beta[1::2])
    plain, factored = (
        qinvert.simulate(qinvert.calibrate(seen, method=method, bits=8), unseen).layers["layer"].sqnr_db
        for method in (block_merge(64, 2, "masked"), block_merge(64, factored=True))
    )
    with capsys.disabled():
        print(f"\n{name}, keys {rho}: {plain:.1f} dB plain, {factored:.1f} factored")
    assert gain < factored - plain < 5.5
