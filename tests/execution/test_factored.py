"""The factored form, K = -L / beta and W = (T - I) / beta, against NumPy in the clear."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from inverse_programs import inverse_program

import qinvert
from qinvert.errors import InputError, PlanError, ProgramError
from qinvert.execution.simulator import simulate_integers
from qinvert.formats import INT4, INT8, INT8X2, INT16
from qinvert.methods import block_merge
from qinvert.metrics import floor_inverse
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import BETA, MATRIX
from qinvert.program.program import Program
from qinvert.program.serialization import program_from_json, program_to_json
from qinvert.program.steps import MIN_BETA, Add, Axis, MatMul, Scale, Slice
from qinvert.proof.intervals import propagate
from qinvert.proof.proof import prove
from qinvert.stress import from_keys, unit_keys
from qinvert.systems import Systems

FORMATS = (INT4, INT8, INT16, INT8X2)
ROWS = Scale(output="rows", source=MATRIX, vector=BETA, axis=Axis.ROWS)
COLUMNS = Scale(output="columns", source="rows", vector=BETA, axis=Axis.COLUMNS)


def matrices(count: int, chunk: int, seed: int = 0, top: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """L and beta, with rows whose beta is 0 or next to it."""
    generator = torch.Generator().manual_seed(seed)
    keys = unit_keys(count, chunk, 0.5, generator)
    beta = top * torch.rand(count, chunk, generator=generator)
    beta[0, chunk // 2 :], beta[-1, 1], beta[-1, 2] = 0, 1e-7, MIN_BETA / 2
    return from_keys(keys, beta, -0.01 * torch.rand(count, chunk, generator=generator)), beta


def program(*steps, **changes) -> Program:
    return inverse_program(*steps, **{"factored": True} | changes)


def planned(tested: Program, fmt=INT8, requantize=Requantize.DIVIDE, **scales: float) -> LayerPlan:
    given = dict.fromkeys(tested.tensors, 1 / fmt.largest) | scales
    tensors = {n: Quantization(format=fmt, scale=float32(s)) for n, s in given.items()}
    return LayerPlan(program=tested, tensors=tensors, requantize=requantize)


def calibrated(chunk: int, requantize=Requantize.MULTIPLIER, top=1.0, **options) -> LayerPlan:
    method = block_merge(chunk, factored=True, corrections=options.pop("corrections", 0))
    target = {Requantize.DIVIDE: "int-ops", Requantize.MULTIPLIER: "npu-qdq-int8"}[requantize]
    options = {"method": method, "bits": 8, "target": target, **options}
    plan = qinvert.calibrate(matrices(8, chunk, top=top), **options).layer()
    assert plan.requantize is requantize
    return plan


# The program as data.


@pytest.mark.parametrize(
    ("steps", "changes", "words"),
    [
        ((ROWS,), {"factored": False}, "reads 'beta', which no earlier step writes"),
        ((Add(output="y", left=MATRIX, right=BETA),), {}, "reads the vector input 'beta'; a scale"),
        ((MatMul(output="y", left=MATRIX, right=BETA),), {}, "no other step may read it"),
        ((Slice(output="y", source=BETA, rows=(0, 2)),), {}, "no other step may read it"),
        ((dataclasses.replace(ROWS, source=BETA),), {}, "reads the vector input 'beta'"),
        ((dataclasses.replace(ROWS, vector=MATRIX),), {}, "reads the vector input 'M'"),
        ((dataclasses.replace(ROWS, axis=Axis.BLOCKS),), {}, "axis .* cannot be scaled; use rows or columns"),
        ((dataclasses.replace(ROWS, axis="rows", output=BETA),), {}, "the name is taken"),
        (
            (Slice(output="half", source=MATRIX, rows=(0, 2)), dataclasses.replace(ROWS, source="half")),
            {},
            r"\[1,2,4\] has 1 blocks of 2 rows, but the vector is \[1,4,1\]; scale whole matrices",
        ),
    ],
)
def test_what_does_not_fit_a_vector_is_refused(steps, changes, words):
    with pytest.raises(ProgramError, match=words):
        program(*steps, **changes)


def test_half_a_matrix_is_scaled_along_its_whole_axis():
    half = Slice(output="half", source=MATRIX, rows=(0, 2))
    scaled = Scale(output="y", source="half", vector=BETA, axis=Axis.COLUMNS)
    tested = program(half, scaled, ROWS)
    assert tested.shapes["y"] == (1, 2, 4)
    assert tested.shapes[BETA] == (1, 4, 1)
    assert tested.tensors == ("M", "beta", "half", "y", "rows")


@pytest.mark.parametrize(
    "given", [{}, {MATRIX: 1}, {MATRIX: 1, "gamma": 1}, {MATRIX: 1, BETA: 1, "gamma": 1}]
)
def test_evaluate_wants_exactly_the_declared_inputs(given):
    with pytest.raises(ProgramError, match=r"takes the inputs M, beta, got"):
        program(ROWS).evaluate(None, given)
    with pytest.raises(ProgramError, match=r"takes the inputs M, got M, beta"):
        block_merge(4).evaluate(None, {MATRIX: 1, BETA: 1})


@pytest.mark.parametrize("tested", [block_merge(16, factored=True, corrections=1), program(ROWS, COLUMNS)])
def test_files_keep_programs(tested):
    document = json.loads(json.dumps(program_to_json(tested)))
    assert document["vectors"] == ["beta"]
    assert program_from_json(document) == tested
    plan = Plan(layers={"layer": planned(tested)}, target="int-ops")
    assert Plan.from_bytes(plan.to_bytes()) == plan


def test_other_programs_do_not_mention_vectors_in_files():
    assert "vectors" not in program_to_json(block_merge(16))


@pytest.mark.parametrize("vectors", ["beta", [1], {"beta": 1}, ["gamma"], None])
def test_damaged_vectors_are_refused(vectors):
    document = program_to_json(program(ROWS)) | {"vectors": vectors}
    with pytest.raises((PlanError, ProgramError)):
        program_from_json(document)


def test_the_table_reads_as_linear_algebra():
    text = str(program(ROWS, COLUMNS))
    assert "diag(beta) @ M" in text
    assert "rows @ diag(beta)" in text
    assert "T = I + diag(beta) @ columns, M stands for -L / beta" in text


def test_scaling_costs_traffic_and_a_step_but_no_multiply_accumulates():
    cost = program(ROWS, COLUMNS).cost()
    assert (cost.macs, cost.matmuls, cost.depth, cost.steps) == (0, 0, 0, 2)
    assert cost.elements == 2 * (16 + 4 + 16)
    one, two = (planned(p).cost() for p in (program(ROWS), program(ROWS, COLUMNS)))
    assert two - one == 600 + 10 * 36


# Input and result.


def test_beta_is_checked():
    lower, beta = matrices(3, 8)
    plan = calibrated(8)
    for wrong, words in [
        (None, "divides the rows of L by beta, which is missing"),
        (beta[:2], r"beta has shape \[2, 8\]; L \[3, 8, 8\] needs one number per row, \[3, 8\]"),
        (beta.unsqueeze(-1), r"beta has shape \[3, 8, 1\]"),
        (beta - 0.5, r"not in \[0, 2\]"),
        (beta + 1.5, r"not in \[0, 2\]"),
        (beta * torch.nan, r"not in \[0, 2\]"),
        (torch.zeros_like(beta), "beta is 0 where the row of L is not"),
        ("beta", "beta is not a real numeric array"),
    ]:
        with pytest.raises(InputError, match=words):
            plan.inverse(lower, wrong)
        with pytest.raises(InputError, match=words):
            plan.program.run(lower, beta=wrong)


def test_programs_without_vectors_ignore_beta():
    lower, beta = matrices(3, 8)
    assert torch.equal(block_merge(8).run(lower, beta=beta), block_merge(8).run(lower))
    plan = qinvert.calibrate((lower, beta)).layer()
    assert torch.equal(plan.inverse(lower, "anything"), plan.inverse(lower))


def test_containers_types_and_leading_axes_survive():
    plan, (lower, beta) = calibrated(8), matrices(6, 8)
    expected = plan.inverse(lower, beta)
    assert np.array_equal(plan.inverse(lower.numpy(), beta.numpy()), expected)
    assert torch.equal(plan.inverse(lower[1], beta[1]), expected[1])
    assert torch.equal(plan.inverse(lower.reshape(2, 3, 8, 8), beta.reshape(2, 3, 8)).flatten(0, 1), expected)
    assert torch.equal(plan.inverse(lower.double(), beta.double()), expected)


def test_rows_of_zeros_give_rows_of_the_identity():
    plan, (lower, beta) = calibrated(16), matrices(4, 16)
    assert torch.equal(plan.inverse(lower, beta)[0, 8:], torch.eye(16)[8:])
    assert torch.equal(plan.inverse(0 * lower, 0 * beta), torch.eye(16).expand(4, -1, -1))


def test_any_positive_beta_gives_the_same_inverse(solved):
    lower, beta = matrices(4, 32)
    tested = block_merge(32, factored=True)
    for other in (beta, beta.sqrt(), torch.full_like(beta, 2.0), torch.full_like(beta, 1e-3)):
        result = tested.run(lower, dtype=torch.float64, beta=other)
        assert torch.allclose(result, solved(lower), rtol=0, atol=1e-12)


# Exact integers.


def single(values) -> np.ndarray:
    return np.asarray(values).astype(np.float32)


def rounded(x, scale, fmt) -> np.ndarray:
    if fmt.planes == 1:
        return np.clip(np.rint(single(x) / np.float32(scale)), fmt.minimum, fmt.maximum).astype(np.int64)
    high = rounded(x, 256 * scale, INT8)
    return 256 * high + rounded(x - single(high) * np.float32(256 * scale), scale, INT8)


def merged(plan: LayerPlan, lower: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """The factored merge of int8 tensors, block by block, written down without the step list."""
    size, scale = lower.shape[-1], {n: np.float32(q.scale) for n, q in plan.tensors.items()}
    multiplier = plan.requantize is Requantize.MULTIPLIER

    def product(name, q, left, right, terms=()):
        unit = scale[left] * scale[right]
        if multiplier:
            q = q + sum(round(1 / float(scale[partner])) * term for term, _, partner in terms)
            return np.clip(np.rint(single(q) * (unit / scale[name])), -128, 127).astype(np.int64)
        x = single(q) * unit
        for term, own, _ in terms:
            x = x + single(term) * scale[own]
        return rounded(x, scale[name], INT8)

    floored = np.maximum(single(beta), np.float32(MIN_BETA))
    b = rounded(floored, scale["beta"], INT8)
    k = rounded(-single(lower) / floored[..., None], scale["M"], INT8)
    total = np.where(np.arange(size)[:, None] // 2 == np.arange(size) // 2, k, 0)
    before = "base_2/W"
    half = 2
    while half < size:
        name = f"merge_{2 * half}"
        rows = product(f"{name}/S", b[..., None] * total, before, "beta")
        columns = product(f"{name}/V", total * b[..., None, :], before, "beta")
        corner = np.zeros_like(total)
        for start in range(0, size, 2 * half):
            low, high = slice(start, start + half), slice(start + half, start + 2 * half)
            k21, s11, v22 = k[..., high, low], rows[..., low, low], columns[..., high, high]
            y = product(f"{name}/Y", k21 @ s11, "M", f"{name}/S", [(k21, "M", f"{name}/S")])
            terms = [(y, f"{name}/Y", f"{name}/V")]
            corner[..., high, low] = product(f"{name}/W21", v22 @ y, f"{name}/V", f"{name}/Y", terms)
        total = rounded(
            single(total) * scale[before] + single(corner) * scale[f"{name}/W21"], scale[f"{name}/W"], INT8
        )
        before, half = f"{name}/W", 2 * half
    real = single(total) * scale[before]
    return real * floored[..., None] + np.eye(size, dtype=np.float32)


@pytest.mark.parametrize("scales", ["float", "pow2"])
@pytest.mark.parametrize("requantize", Requantize)
@pytest.mark.parametrize(("chunk", "top"), [(4, 1.0), (32, 1.0), (32, 2.0), (64, 0.1)])
def test_every_value_is_that_of_a_block_by_block_merge_in_numpy(chunk, top, requantize, scales):
    plan = calibrated(chunk, requantize, top, scales=scales)
    lower, beta = matrices(6, chunk, seed=1, top=top)
    expected = merged(plan, lower.numpy(), beta.numpy())
    assert np.array_equal(plan.inverse(lower, beta).numpy(), expected)


def planes(grid: Quantization, q: np.ndarray) -> list[tuple[np.ndarray, np.float32]]:
    # int16 stays whole on both sides: graphs multiply 16 by 16 bits where nothing is summed.
    if grid.format != INT8X2:
        return [(q, np.float32(grid.scale))]
    low = (q + 128) % 256 - 128
    return [((q - low) // 256, np.float32(256 * grid.scale)), (low, np.float32(grid.scale))]


def scaled(plan: LayerPlan, step: Scale, q: dict[str, np.ndarray]) -> np.ndarray:
    """A scale from its definition: exact products of planes, low times low dropped, one chain of float32."""
    vector = q[step.vector] if step.axis == "rows" else np.swapaxes(q[step.vector], 1, 2)
    lefts = planes(plan.tensors[step.source], q[step.source])
    rights = planes(plan.tensors[step.vector], vector)
    output, x = plan.tensors[step.output], None
    for weight in (0, 1):
        pairs = [
            (a, b)
            for (i, a), (j, b) in itertools.product(*map(enumerate, (lefts, rights)))
            if i + j == weight
        ]
        if not pairs:
            continue
        total, unit = sum(a[0] * b[0] for a, b in pairs), pairs[0][0][1] * pairs[0][1][1]
        if plan.requantize is Requantize.MULTIPLIER:
            return rounded(single(total) * (unit / np.float32(output.scale)), 1.0, output.format)
        x = single(total) * unit if x is None else x + single(total) * unit
    return rounded(x, output.scale, output.format)


def observed(plan: LayerPlan, lower: torch.Tensor, beta: torch.Tensor) -> dict[str, np.ndarray]:
    seen = {}
    systems = Systems(lower=lower, beta=beta)
    simulate_integers(plan, systems, lambda name, q: seen.update({name: q.numpy().astype(np.int64)}))
    assert tuple(seen) == plan.program.tensors
    return seen


@pytest.mark.parametrize("formats", list(itertools.product(FORMATS, repeat=2)), ids=str)
@pytest.mark.parametrize("output", FORMATS, ids=str)
def test_scales_of_every_format_by_every_format(formats, output):
    tested = program(ROWS, COLUMNS, chunk=8)
    kinds = dict(zip((MATRIX, BETA), formats, strict=True)) | dict.fromkeys(("rows", "columns"), output)
    tensors = {
        name: Quantization(format=fmt, scale=float32(1.3 / fmt.largest)) for name, fmt in kinds.items()
    }
    plan = LayerPlan(program=tested, tensors=tensors, requantize=Requantize.DIVIDE)
    seen = observed(plan, *matrices(5, 8, top=2.0))
    for step in tested.steps:
        assert np.array_equal(seen[step.output], scaled(plan, step, seen)), step


@pytest.mark.parametrize("requantize", Requantize)
def test_scales_saturate(requantize):
    plan = planned(program(ROWS, COLUMNS), requantize=requantize, rows=1 / 999, columns=0.3)
    seen = observed(plan, *matrices(5, 4))
    assert {seen["rows"].min(), seen["rows"].max()} & {-128, 127}
    for step in plan.program.steps:
        assert np.array_equal(seen[step.output], scaled(plan, step, seen)), step


def test_autocast_changes_no_bit():
    plan, (lower, beta) = calibrated(16), matrices(4, 16)
    expected = plan.inverse(lower, beta)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plan.inverse(lower, beta), expected)


def test_an_overflowing_multiplier_is_refused():
    with pytest.raises(PlanError, match="overflow float32"):
        planned(program(ROWS), requantize=Requantize.MULTIPLIER, M=1e15, beta=1e15, rows=1e-30)


# What is proved.


def ends_of(plan: LayerPlan, limit: float | None):
    ends = {}
    facts = propagate(plan, limit, lambda name, low, high: ends.update({name: (low.numpy(), high.numpy())}))
    return ends, facts


def corners(chunk: int, limit: float, top: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """L and beta at the ends of ``|K| <= limit, beta <= top``, and inside."""
    rng = np.random.default_rng(seed)
    k = np.sign(rng.standard_normal((300, chunk, chunk))) * rng.choice([0, 0.4, 1], size=(300, chunk, chunk))
    beta = top * rng.choice([0, 0.3, 1], size=(300, chunk), p=[0.1, 0.2, 0.7])
    beta[:30], k[:30] = top, np.sign(k[:30] + 0.5)
    lower = np.tril(beta[..., None] * k * limit, -1)
    return torch.from_numpy(lower), torch.from_numpy(beta)


FORMS = [
    *itertools.product(FORMATS, [Requantize.DIVIDE], [0, 1]),
    *itertools.product([INT4, INT8], [Requantize.MULTIPLIER], [0]),
]


@pytest.mark.parametrize(("fmt", "requantize", "corrections"), FORMS, ids=str)
@pytest.mark.parametrize("limit", [None, 1.0, 0.2])
def test_no_integer_leaves_its_interval(fmt, requantize, corrections, limit):
    plan = planned(block_merge(4, factored=True, corrections=corrections), fmt, requantize)
    seen = observed(plan, *corners(4, 3.0 if limit is None else limit, 2.0, seed=1))
    ends, facts = ends_of(plan, limit)
    assert tuple(ends) == plan.program.tensors
    for name, (low, high) in ends.items():
        assert (low <= seen[name]).all(), name
        assert (seen[name] <= high).all(), name
    for step in plan.program.steps:
        if isinstance(step, Scale):
            left = planes(plan.tensors[step.source], seen[step.source])
            right = planes(plan.tensors[step.vector], seen[step.vector])
            first, *_ = facts.accumulators[step.output]
            b = right[0][0] if step.axis == "rows" else np.swapaxes(right[0][0], 1, 2)
            product = left[0][0] * b
            assert first.low <= product.min() <= product.max() <= first.high
            bound = plan.proof().accumulator_bound
            assert abs(product).max() <= first.largest <= bound < (2**30 if fmt.is_wide else 2**24)


def test_intervals_of_scales_are_attained():
    plan = planned(program(ROWS, COLUMNS), rows=2 / 127, columns=4 / 127, beta=2 / 127)
    seen = observed(plan, *corners(4, 1.0, 2.0, seed=1))
    ends, _ = ends_of(plan, 1.0)
    for name in (MATRIX, BETA, "rows", "columns"):
        low, high = ends[name]
        assert (seen[name].max(0) == high[0]).all(), name
        assert (seen[name].min(0) == low[0]).all(), name


@pytest.mark.parametrize(
    ("limit", "rows", "beta", "proved"),
    [
        (1.0, 2.0, 2.0, {"M", "beta", "rows"}),
        (1.0, 1.9, 2.0, {"M", "beta"}),
        (1.0, 1.9, 1.9, {"M", "rows"}),
        (None, 2.0, 2.0, {"rows"}),
        (1.1, 2.2, 2.0, {"beta", "rows"}),
    ],
)
def test_what_cannot_saturate_follows_from_limit_and_the_largest_beta(limit, rows, beta, proved):
    plan = planned(program(ROWS), rows=rows / 127, beta=beta / 127)
    assert set(propagate(plan, limit).cannot_saturate) == proved


@pytest.mark.parametrize("max_beta", [0.25, 1.0, 2.0])
def test_the_proof_scales_bounds_by_beta_where_they_hold_beta(max_beta):
    tested = block_merge(8, factored=True)
    kinds = {step.output: type(step) for step in tested.steps} | {BETA: Scale}
    exact = {name: max_beta if kinds.get(name) is Scale else 1.0 for name in tested.tensors}
    covering = planned(tested, **{name: bound / 127 for name, bound in exact.items()})
    assert not prove(covering, max_beta=max_beta).may_saturate
    for name in (BETA, "merge_4/S", "merge_4/V", "merge_8/S", "merge_8/V", "merge_8/Y", "merge_8/W"):
        grid = Quantization(format=INT8, scale=float32(0.98 * exact[name] / 127))
        narrow = dataclasses.replace(covering, tensors={**covering.tensors, name: grid})
        assert prove(narrow, max_beta=max_beta).may_saturate == {name: grid.limit}


# The floor.


@pytest.mark.parametrize("top", [1.0, 2.0])
def test_the_floor_is_the_exact_inverse_of_the_quantized_inputs_on_the_grid_of_w(top, solved):
    plan, (lower, beta) = calibrated(16, top=top), matrices(6, 16, seed=2, top=top)
    b = np.maximum(beta.numpy(), np.float32(MIN_BETA))
    grids = {name: (np.float32(q.scale), q.format) for name, q in plan.tensors.items()}
    k, rows = (
        rounded(x, *grids[name]) * grids[name][0].astype(np.float64)
        for name, x in ((MATRIX, -lower.numpy() / b[..., None]), (BETA, b))
    )
    w = k @ solved(torch.from_numpy(-rows[..., None] * k)).numpy()
    scale, fmt = grids[plan.program.inverse_ports.result]
    expected = rounded(w, scale, fmt) * scale.astype(np.float64) * b[..., None] + np.eye(16)
    assert np.allclose(
        floor_inverse(plan, Systems(lower=lower, beta=beta)).numpy(), expected, rtol=0, atol=1e-6
    )
