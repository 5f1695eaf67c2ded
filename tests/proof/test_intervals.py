from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inverse_programs import inverse_program
from step_plans import small_plan, step_inputs

from qinvert.calibration.planning.scales import scale_groups
from qinvert.chunk_step.ports import step_sizes
from qinvert.errors import PlanError
from qinvert.execution.simulator import evaluate, simulate_integers
from qinvert.formats import INT4, INT8, INT8X2, INT16, PLANE_RATIO
from qinvert.methods import (
    banded_residual,
    block_merge,
    column_sweep,
    forward_substitution,
    neumann,
    neumann_doubling,
    newton_schulz,
)
from qinvert.numerics import rounding
from qinvert.numerics.exact import dot_scalar
from qinvert.numerics.exact import planes as exact_planes
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import MATRIX
from qinvert.program.program import Program
from qinvert.program.steps import Add, Axis, Concat, Constant, Mask, MatMul, Rescale, Slice
from qinvert.proof import intervals
from qinvert.proof.interval_arithmetic import join, magnitude, product, split
from qinvert.proof.intervals import propagate
from qinvert.systems import Systems

PROGRAMS = (
    block_merge(4, 1),
    block_merge(4, 2, corrections=1),
    block_merge(4, 4),
    block_merge(4, 1, "masked", corrections=1),
    block_merge(8, 1),
    block_merge(8, 2, "masked"),
    block_merge(8, 4, corrections=2),
    neumann(4, 3),
    neumann(8, 4),
    neumann_doubling(4),
    neumann_doubling(8),
    banded_residual(4, 1, 2),
    forward_substitution(4),
    column_sweep(4),
)
#: Its terms d M are no operands of their products: only the divide form takes it.
WITH_FACTORS = newton_schulz(4, 2)
RATIO = np.float32(256)
LOWER = Constant(name="lower", rows=4, columns=4, ones=tuple((0, i) for i in range(4)))
ZEROS = Constant(name="zeros", rows=2, columns=4, ones=((0, 0),) * 2)


@st.composite
def random_steps(draw) -> Program:
    """Any few steps on 4 x 4 matrices, cancelling and repeating as they like."""
    names, steps = [MATRIX], []
    for k in range(draw(st.integers(1, 6))):
        left, right = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        residuals = st.lists(st.sampled_from((left, right)), max_size=2).map(tuple)
        match draw(st.sampled_from(("matmul", "matmul", "add", "rescale", "mask", "swap"))):
            case "matmul":
                terms = {"add": draw(residuals), "subtract": draw(residuals)}
                steps.append(MatMul(output=f"t{k}", left=left, right=right, **terms))
            case "add":
                steps.append(Add(output=f"t{k}", left=left, right=right))
            case "rescale":
                steps.append(Rescale(output=f"t{k}", source=left))
            case "mask":
                steps.append(Mask(output=f"t{k}", source=left, constant="lower"))
            case "swap":
                upper = Slice(output=f"t{k}/upper", source=left, rows=(0, 2))
                lower = Slice(output=f"t{k}/lower", source=left, rows=(2, 4))
                order = draw(st.permutations((upper.output, lower.output, "zeros")))[:2]
                if order[0] == "zeros" and order[1] == "zeros":
                    order[0] = upper.output
                steps += [upper, lower, Concat(output=f"t{k}", sources=tuple(order), axis=Axis.ROWS)]
        names.append(f"t{k}")
    output = draw(st.sampled_from(names))
    return inverse_program(*steps, name="random", constants=(LOWER, ZEROS), output=output)


@st.composite
def grids(draw, formats, reciprocal) -> Quantization:
    fmt = draw(st.sampled_from(formats))
    end = 2.0 ** draw(st.floats(-5, 5))
    scale = 1 / max(1, round(fmt.largest / end)) if reciprocal else end / fmt.largest
    return Quantization(format=fmt, scale=float32(scale))


@st.composite
def plans(draw) -> LayerPlan:
    program = draw(st.sampled_from((*PROGRAMS, WITH_FACTORS)) | random_steps())
    forms = [Requantize.DIVIDE] if program is WITH_FACTORS else list(Requantize)
    requantize = draw(st.sampled_from(forms))
    single = requantize is Requantize.MULTIPLIER
    grid = grids((INT4, INT8, INT16) if single else (INT4, INT8, INT16, INT8X2), single)
    groups = scale_groups(program)
    shared = {group: draw(grid) for group in dict.fromkeys(groups.values())}
    tensors = {name: shared[group] for name, group in groups.items()}
    return LayerPlan(program=program, tensors=tensors, requantize=requantize)


def matrices(plan: LayerPlan, limit: float | None, seed: int) -> torch.Tensor:
    """Every corner and centre of the input box at C = 4, some at C = 8, and points inside."""
    size = 2 * plan.input.limit if limit is None else limit
    rows, columns = np.tril_indices(plan.chunk, -1)
    rng = np.random.default_rng(seed)
    if plan.chunk == 4:
        corners = np.array(list(itertools.product((-1, 0, 1), repeat=6)))
    else:
        signs = np.sign(rng.standard_normal((2, plan.chunk)))
        rank_one = np.outer(*signs)[rows, columns]
        corners = np.stack([*rng.integers(-1, 2, (60, len(rows))), np.ones(len(rows)), rank_one, -rank_one])
    inside = rng.uniform(-1, 1, (60, len(rows)))
    lower = np.zeros((len(corners) + len(inside), plan.chunk, plan.chunk), dtype=np.float32)
    lower[:, rows, columns] = np.concatenate([corners, inside]) * size
    assert limit is None or abs(lower).max() <= limit
    return torch.from_numpy(lower)


def single(values) -> np.ndarray:
    return np.asarray(values).astype(np.float32)


def planes(grid: Quantization, q: np.ndarray, right=False) -> list[tuple[np.ndarray, np.float32]]:
    """Integers and scale of every plane, from the definition."""
    scale = np.float32(grid.scale)
    if grid.format == INT8X2:
        low = (q + 128) % 256 - 128
        return [((q - low) // 256, RATIO * scale), (low, scale)]
    if grid.format == INT16 and right:
        x = single(q) * scale
        high = np.clip(np.rint(x / (RATIO * scale)), -128, 127)
        low = np.clip(np.rint((x - high * (RATIO * scale)) / scale), -128, 127)
        return [(high.astype(np.int64), RATIO * scale), (low.astype(np.int64), scale)]
    return [(q, scale)]


def groups(plan: LayerPlan, step: MatMul, q: dict[str, np.ndarray]):
    """Pairs of planes that share an accumulator, and its unit; low times low is dropped."""
    lefts = planes(plan.tensors[step.left], q[step.left])
    rights = planes(plan.tensors[step.right], q[step.right], right=True)
    for weight in (0, 1):
        pairs = [(a, b) for i, a in enumerate(lefts) for j, b in enumerate(rights) if i + j == weight]
        if pairs:
            (_, left_scale), (_, right_scale) = pairs[0]
            yield [(a, b) for (a, _), (b, _) in pairs], left_scale * right_scale


def accumulators(plan: LayerPlan, step: MatMul, q: dict[str, np.ndarray]):
    """Final value, sum of all magnitudes, and unit of every accumulator; int64 never wraps here."""
    signed = [(name, 1) for name in step.add] + [(name, -1) for name in step.subtract]
    for plane, (pairs, unit) in enumerate(groups(plan, step, q)):
        total = sum(a @ b for a, b in pairs)
        largest = sum(abs(a) @ abs(b) for a, b in pairs)
        if plan.requantize is Requantize.MULTIPLIER:
            for name, sign in signed:
                term = sign * residual(plan, step, name, q[name], plane)
                total, largest = total + term, largest + abs(term)
        yield total, largest, unit


def residual(plan: LayerPlan, step: MatMul, name: str, q: np.ndarray, plane: int) -> np.ndarray:
    """What ``name`` is worth in one accumulator: 1.0 on the other operand's grid times its integers."""
    right = plan.tensors[step.right]
    one = round(1 / plan.tensors[step.left if name == step.right else step.right].scale)
    if right.format != INT16:
        return one * q
    if name == step.right:
        return one * planes(right, q, right=True)[plane][0]
    count, rest = divmod(one, 127 * 256)
    return q * int(planes(right, np.array(rest), right=True)[plane][0] + (1 - plane) * 127 * count)


def unsaturated(plan: LayerPlan, step: MatMul | Add | Rescale, q: dict[str, np.ndarray]) -> np.ndarray:
    """Value in steps of the output, rounded but not clipped."""
    output = np.float32(plan.tensors[step.output].scale)
    if isinstance(step, MatMul):
        terms = [(total, unit) for total, _, unit in accumulators(plan, step, q)]
        if plan.requantize is Requantize.MULTIPLIER:
            parts = [np.rint(single(total) * (unit / output)) for total, unit in terms]
            fmt = plan.tensors[step.output].format
            # One of two parts saturates by itself, on the way.
            return sum(parts) if len(parts) == 1 else sum(np.clip(p, fmt.minimum, fmt.maximum) for p in parts)
        signed = [(name, 1) for name in step.add] + [(name, -1) for name in step.subtract]
    else:
        terms, signed = [], [(name, 1) for name in step.inputs]
    terms += [
        (plane, sign * scale) for name, sign in signed for plane, scale in planes(plan.tensors[name], q[name])
    ]
    x = single(terms[0][0]) * terms[0][1]
    for plane, scale in terms[1:]:
        x = x + single(plane) * scale
    if isinstance(step, Rescale):
        x = x * np.float32(step.factor)
    return np.rint(x / output)


def proved(plan: LayerPlan, limit: float | None = None):
    ends = {}
    facts = propagate(plan, limit, lambda name, low, high: ends.update({name: (low.numpy(), high.numpy())}))
    return ends, facts


def check(plan: LayerPlan, lower: torch.Tensor, ends, facts) -> None:
    """Hold what was proved against every integer of a simulation."""
    seen = {}
    simulate_integers(
        plan, Systems(lower=lower), lambda name, q: seen.update({name: q.numpy().astype(np.int64)})
    )
    assert tuple(ends) == plan.program.tensors
    for name, (low, high) in ends.items():
        q = seen[name].reshape(low.shape[0], len(lower), *low.shape[1:])
        assert (low[:, None] <= q).all(), name
        assert (q <= high[:, None]).all(), name
    free = {MATRIX: np.rint(-lower.numpy() / np.float32(plan.input.scale))}
    for step in plan.program.steps:
        if isinstance(step, MatMul):
            found = list(accumulators(plan, step, seen))
            for (total, largest, _), bounds in zip(found, facts.accumulators[step.output], strict=True):
                assert bounds.low <= total.min(), step
                assert total.max() <= bounds.high, step
                assert largest.max() <= bounds.largest <= plan.products[step.output].bound < 2**31, step
        if isinstance(step, (MatMul, Add, Rescale)):
            free[step.output] = unsaturated(plan, step, seen)
            check_reference(plan.tensors[step.output], free[step.output], seen[step.output])
    for name in free.keys() & set(facts.cannot_saturate):
        fmt = plan.tensors[name].format
        assert fmt.minimum <= free[name].min(), name
        assert free[name].max() <= fmt.maximum, name


def check_reference(grid: Quantization, free: np.ndarray, q: np.ndarray) -> None:
    # Two planes round one after the other: near a tie the low one ends one step short.
    tolerance = 1 if grid.format == INT8X2 else 0
    assert abs(np.clip(free, grid.format.minimum, grid.format.maximum) - q).max() <= tolerance


def single_grid(program: Program, steps=127, fmt=INT8, requantize=Requantize.DIVIDE, **others) -> LayerPlan:
    grid = Quantization(format=fmt, scale=float32(1 / steps))
    tensors = dict.fromkeys(program.tensors, grid) | others
    return LayerPlan(program=program, tensors=tensors, requantize=requantize)


limits = st.none() | st.floats(2.0**-6, 8.0, width=32)


@settings(max_examples=400)
@given(plan=plans(), limit=limits, seed=st.integers(0, 2**32 - 1))
def test_no_integer_of_any_input_leaves_its_interval(plan, limit, seed):
    check(plan, matrices(plan, limit, seed), *proved(plan, limit))


@pytest.mark.parametrize(
    ("fmt", "requantize"),
    [
        *itertools.product((INT4, INT8, INT16), Requantize),
        (INT8X2, Requantize.DIVIDE),
    ],
    ids=str,
)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.title)
def test_all_methods_in_all_formats(program, fmt, requantize):
    plan = single_grid(program, fmt.largest, fmt, requantize)
    for limit in (None, 1.0, 0.1):
        check(plan, matrices(plan, limit, 0), *proved(plan, limit))


@pytest.mark.parametrize("fmt", [INT4, INT8, INT16, INT8X2], ids=str)
def test_factors_in_all_formats(fmt):
    plan = single_grid(WITH_FACTORS, fmt.largest, fmt, Requantize.DIVIDE)
    for limit in (None, 1.0, 0.1):
        check(plan, matrices(plan, limit, 0), *proved(plan, limit))


@pytest.mark.parametrize("limit", [None, 1.0])
def test_the_first_product_of_the_whole_box_attains_its_bound(limit):
    plan = single_grid(neumann(4, 2))
    ends, facts = proved(plan, limit)
    seen = {}
    simulate_integers(
        plan, Systems(lower=matrices(plan, limit, 0)), lambda name, q: seen.update({name: q.numpy()})
    )
    m = seen[MATRIX].astype(np.int64)
    (bounds,) = facts.accumulators["power_2"]
    total = m @ m
    assert total.max() == bounds.high == bounds.largest == 2 * (128 if limit is None else 127) ** 2
    assert np.array_equal(ends[MATRIX][0][0], m.min(0))
    assert np.array_equal(ends[MATRIX][1][0], m.max(0))
    if limit is not None:
        assert total.min() == bounds.low == -bounds.high


def test_triangles_shorten_the_sum():
    plan = single_grid(neumann(8, 7))
    largest = {name: bounds[0].largest for name, bounds in proved(plan)[1].accumulators.items()}
    # M^k has C - k diagonals, so C - k of its entries meet M's in the lower left corner.
    assert largest == {f"power_{k}": (8 - k) * 128 * 128 for k in range(2, 8)}


def test_a_limit_narrows_everything_behind_it():
    plan = single_grid(block_merge(8, 4, corrections=1))
    (wide, facts), (narrow, tight) = proved(plan), proved(plan, 0.1)
    for name in plan.program.tensors:
        assert (wide[name][0] <= narrow[name][0]).all()
        assert (narrow[name][1] <= wide[name][1]).all()
    for step, (bounds,) in tight.accumulators.items():
        assert bounds.largest < facts.accumulators[step][0].largest
    assert set(facts.cannot_saturate) < set(tight.cannot_saturate) == set(plan.program.tensors)


def test_zero_in_zero_out():
    ends, facts = proved(single_grid(block_merge(4, 1, corrections=1)), 0)
    assert not any(end.any() for pair in ends.values() for end in pair)
    assert {bounds for (bounds,) in facts.accumulators.values()} == {(0, 0, 0)}


@pytest.mark.parametrize(("limit", "safe"), [(0.99, True), (1.0039, True), (1.01, False), (math.inf, False)])
def test_m_saturates_unless_the_limit_lies_on_its_grid(limit, safe):
    plan = single_grid(block_merge(4, 1))
    _, facts = proved(plan, limit)
    assert (MATRIX in facts.cannot_saturate) is safe
    # Slices of M hold what M holds; a copy on the same grid clips nothing more.
    assert ("base_2/M" in facts.cannot_saturate) is safe
    assert "base_2/S" in facts.cannot_saturate


def test_a_subtracted_term_swaps_its_ends():
    step = MatMul(output="y", left=MATRIX, right=MATRIX, subtract=(MATRIX,))
    program = inverse_program(Rescale(output="x", source=MATRIX), step)
    for requantize in Requantize:
        plan = single_grid(program, requantize=requantize, x=Quantization(format=INT8, scale=0.5))
        ends, facts = proved(plan)
        # Row 1 of the product is empty: y = -M there, clipped at the grid's end.
        assert [end[0, 1, 0] for end in ends["y"]] == [-127, 127]
        assert "y" not in facts.cannot_saturate
        check(plan, matrices(plan, None, 0), ends, facts)


def intervals_of(draw, rows, columns) -> tuple[np.ndarray, np.ndarray]:
    ends = st.lists(st.integers(-5, 5), min_size=2 * rows * columns, max_size=2 * rows * columns)
    pairs = np.sort(np.array(draw(ends)).reshape(2, rows, columns), axis=0)
    return pairs[0], pairs[1]


@given(data=st.data(), symmetric=st.booleans())
def test_products_of_intervals_hold_all_products_of_their_ends(data, symmetric):
    a, b = (intervals_of(data.draw, *shape) for shape in ((2, 3), (3, 1)))
    if symmetric:
        a, b = ((-abs(high), abs(high)) for _, high in (a, b))
    tensors = [join(*(torch.tensor(end[None], dtype=torch.float32) for end in pair)) for pair in (a, b)]
    interval, largest = product(*tensors)
    low, high = (end[0].numpy() for end in split(interval))
    # Bilinear: each term reaches its extremes at ends, independently of the others.
    terms = np.stack([x[:, :, None] * y[None] for x in a for y in b])
    exact_low, exact_high = terms.min(0).sum(1), terms.max(0).sum(1)
    assert (low <= exact_low).all()
    assert (exact_high <= high).all()
    assert (high - low <= 1.5 * (exact_high - exact_low)).all()
    assert np.array_equal(largest[0], abs(terms).max(0).sum(1))
    if symmetric:
        assert np.array_equal(high, exact_high)
        assert np.array_equal(low, exact_low)


@pytest.mark.parametrize("scale", [2.0**-15, float32(1 / 32767), float32(0.37)])
def test_both_ways_to_split_16_bits_are_monotone(scale):
    for fmt, way in ((INT8X2, exact_planes), (INT16, rounding.operand_planes)):
        q = torch.arange(fmt.minimum, fmt.maximum + 1, dtype=torch.float32)
        (high, _), (low, _) = way(q, scale, fmt)
        assert bool((torch.diff(PLANE_RATIO * high + low) >= 0).all())
        assert bool((torch.diff(high) >= 0).all())


@given(st.integers(INT8X2.minimum, INT8X2.maximum), st.integers(0, 600))
def test_planes_of_an_interval_hold_the_planes_of_its_integers(low, width):
    plan = single_grid(neumann(2, 1), INT8X2.largest, INT8X2)
    q = torch.arange(low, min(low + width, INT8X2.maximum) + 1, dtype=torch.float32).reshape(-1, 1, 1)
    evaluator = intervals.IntervalEvaluator(plan)
    bounds = evaluator._planes(MATRIX, join(q[:1], q[-1:]))
    for (interval, scale), (plane, other) in zip(bounds, exact_planes(q, 1.0, INT8X2), strict=True):
        start, stop = split(interval)
        assert scale == other * plan.input.scale
        assert bool(((start <= plane) & (plane <= stop)).all())
        if len(q) == 1:
            assert start == stop


@pytest.mark.parametrize("name", ["M", "power_2", "sum_3"])
@pytest.mark.parametrize("end", [0, 1])
def test_the_check_notices_an_interval_that_is_one_too_narrow(name, end):
    plan = single_grid(neumann(4, 3))
    ends, facts = proved(plan)
    check(plan, matrices(plan, None, 0), ends, facts)
    ends[name][end][0, 3, 0] -= (-1, 1)[end]
    with pytest.raises(AssertionError, match=name):
        check(plan, matrices(plan, None, 0), ends, facts)


@pytest.mark.parametrize("field", ["high", "largest"])
def test_the_check_notices_an_accumulator_that_is_one_too_narrow(field):
    plan = single_grid(neumann(4, 2))
    ends, facts = proved(plan)
    (bounds,) = facts.accumulators["power_2"]
    facts.accumulators["power_2"] = (bounds._replace(**{field: getattr(bounds, field) - 1}),)
    with pytest.raises(AssertionError, match="power_2"):
        check(plan, matrices(plan, None, 0), ends, facts)


def test_the_check_notices_a_tensor_that_saturates_after_all():
    plan = single_grid(neumann(4, 2))
    ends, facts = proved(plan)
    assert "power_2" not in facts.cannot_saturate
    claimed = intervals.Intervals(accumulators=facts.accumulators, cannot_saturate=plan.program.tensors)
    with pytest.raises(AssertionError, match=r"^(M|power_2|sum_2)\b"):
        check(plan, matrices(plan, None, 0), ends, claimed)


def test_the_check_notices_a_product_of_ends_alone(monkeypatch):
    def wrong(left, right):
        (a, b), (c, d) = split(left.double()), split(right.double())
        return join(a @ c, b @ d), magnitude(left) @ magnitude(right)

    monkeypatch.setattr(intervals, "product", wrong)
    plan = single_grid(neumann(4, 2))
    with pytest.raises(AssertionError, match="power_2"):
        check(plan, matrices(plan, None, 0), *proved(plan))


def test_the_check_notices_a_low_plane_between_two_high_ones(monkeypatch):
    monkeypatch.setattr(intervals, "low_plane", lambda _high, low: low)
    plan = single_grid(neumann(4, 2), INT8X2.largest, INT8X2)
    with pytest.raises(AssertionError, match="power_2"):
        check(plan, matrices(plan, 0.4, 0), *proved(plan, 0.4))


def test_python_integers_agree():
    plan = single_grid(block_merge(4, 1, "masked"), requantize=Requantize.MULTIPLIER)
    facts = propagate(plan)
    seen = {}
    lower = matrices(plan, None, 0)
    simulate_integers(plan, Systems(lower=lower), lambda name, q: seen.update({name: q.long().tolist()}))
    for step in plan.program.steps:
        if isinstance(step, MatMul):
            (bounds,) = facts.accumulators[step.output]
            for b, i, j in itertools.product(range(len(lower)), range(4), range(4)):
                column = [row[j] for row in seen[step.right][b]]
                total = dot_scalar(seen[step.left][b][i], column)
                total += sum(127 * seen[name][b][i][j] for name in step.add)
                assert bounds.low <= total <= bounds.high


@pytest.mark.parametrize("limit", [-1.0, math.nan, "1", True])
def test_a_limit_is_a_magnitude(limit):
    with pytest.raises(PlanError, match=r"limit .* is not a number of at least 0; pass the largest"):
        propagate(single_grid(neumann(4, 2)), limit)


@pytest.mark.parametrize("limit", [None, 4.0])
@pytest.mark.parametrize("size", [1.0, 1e6])
def test_a_state_in_float32_lies_in_its_interval_and_never_saturates(limit, size):
    plan, ends, seen = small_plan("npu-qdq-int8", float_state=True).layer(), {}, {}
    limits = None if limit is None else dict.fromkeys(("q", "k", "v", "beta", "g", "state"), limit)
    facts = propagate(plan, limits, lambda name, low, high: ends.update({name: (low, high)}))
    inputs = step_inputs(step_sizes(plan.program), 4)
    inputs["state"] = (size * inputs["state"]).clamp(-limit, limit) if limit else size * inputs["state"]
    evaluate(plan, inputs, lambda name, values: seen.update({name: values}))
    for name, values in seen.items():
        low, high = ends[name]
        assert bool((low <= values).all() and (values <= high).all()), name
    assert {"state", "state/kept", "state/new"} <= {*facts.cannot_saturate}
    # What is read of a state does saturate, unless something is promised of the state.
    assert "state/read" not in facts.cannot_saturate
