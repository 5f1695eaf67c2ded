"""Integer meaning of the kinds of steps of a chunk step: scalar twins, number by number, and intervals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from qinvert.errors import PlanError
from qinvert.execution import hexagon, tflite
from qinvert.execution.simulator import evaluate
from qinvert.formats import INT4, INT8, INT8X2, INT16, INT16_WHOLE
from qinvert.hardware._operators import Kind, operators
from qinvert.numerics import scalar
from qinvert.numerics.accumulators import partial_factors
from qinvert.numerics.exact import integer_multiply
from qinvert.numerics.scales import float32, multiplier, product_scale
from qinvert.plan.far_sums import is_far
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import Port
from qinvert.program.program import Program
from qinvert.program.steps import (
    MOVES,
    Add,
    Constant,
    Exponential,
    Mask,
    MatMul,
    Multiply,
    Shape,
    Subtract,
    Transpose,
)
from qinvert.proof.intervals import propagate

FORMATS = (INT4, INT8, INT16, INT16_WHOLE, INT8X2)
SHAPES = {"a": (3, 4), "b": (3, 4), "row": (1, 4), "column": (3, 1), "number": (1, 1)}
ONES = Constant(name="ones", rows=4, columns=4, ones=((0, 2), (1, 4), (0, 0), (3, 4)))
LIKE_A = Constant(name="like_a", rows=3, columns=4, ones=((0, 2), (1, 4), (3, 4)))


def port(name: str, shape, tensor: str = "") -> Port:
    return Port(name=name, shape=Shape(1, *shape), tensor=tensor)


def program(step) -> Program:
    used = tuple(port(name, SHAPES[name]) for name in SHAPES if name in step.inputs)
    constants = tuple(c for c in (ONES, LIKE_A) if c.name in step.inputs)
    fields = {"name": "x", "chunk": 4, "inputs": used, "constants": constants, "steps": (step,)}
    shape = Program(outputs=(port(used[0].name, used[0].shape[1:]),), **fields).shapes["y"]
    return Program(outputs=(port("o", shape[1:], "y"),), **fields)


def planned(step, formats, requantize, seed: int = 0) -> LayerPlan:
    """Random scales; the inputs have ``formats`` in turn, the result has the last."""
    tested, rng = program(step), np.random.default_rng(seed)
    tensors = {}
    for i, name in enumerate(tested.tensors):
        fmt = formats[-1] if name == "y" else formats[i % (len(formats) - 1)]
        scale = float32(float(np.exp(rng.normal() / 2)) / fmt.largest)
        tensors[name] = Quantization(format=fmt, scale=scale)
    if isinstance(step, MOVES):
        tensors = dict.fromkeys(tensors, tensors[step.source])
    return LayerPlan(program=tested, tensors=tensors, requantize=requantize)


def integers(plan: LayerPlan, seed: int, count: int = 40) -> dict[str, torch.Tensor]:
    """Integers of every input, its ends and zero among them."""
    rng, found = np.random.default_rng(seed), {}
    for given in plan.program.inputs:
        fmt = plan.tensors[given.name].format
        values = rng.integers(fmt.minimum, fmt.maximum + 1, size=(count, *given.shape[1:]))
        ends = rng.choice([fmt.minimum, fmt.maximum, 0, 1, -1], size=values.shape)
        found[given.name] = torch.from_numpy(np.where(rng.random(values.shape) < 0.3, ends, values)).float()
    return found


def simulated(plan: LayerPlan, given: dict[str, torch.Tensor]) -> np.ndarray:
    """Integers of the result for integers of the inputs."""
    reals = {}
    for name, value in given.items():
        grid = plan.tensors[name]
        reals[name] = torch.tensor(
            [scalar.dequantize_scalar(int(q), grid.scale, grid.format) for q in value.flatten()]
        ).reshape(value.shape)
    seen = {}
    evaluate(plan, reals, seen.__setitem__)
    for name, value in given.items():
        # Two planes may round again to another integer: then the oracle takes what the simulator read.
        given[name] = seen[name]
        assert plan.tensors[name].format.planes > 1 or torch.equal(seen[name], value)
    return seen["y"].numpy()


def multiplied(plan: LayerPlan, a: int, b: int) -> int:
    """One product of integers, from the scalar twins: right operands stay whole."""
    left, right = (plan.tensors[port_.tensor] for port_ in plan.program.inputs)
    if plan.program.steps[0].left != plan.program.inputs[0].name:
        left, right = right, left
    output = plan.tensors["y"]
    lefts, rights = (scalar.planes_scalar(q, grid.scale, grid.format) for q, grid in ((a, left), (b, right)))
    groups: dict[int, list] = {}
    for (i, p), (j, q) in itertools.product(enumerate(lefts), enumerate(rights)):
        if i + j < 2:
            groups.setdefault(i + j, []).append((p[0] * q[0], product_scale(p[1], q[1])))
    totals = [(sum(n for n, _ in group), group[0][1]) for group in groups.values()]
    if plan.requantize is Requantize.MULTIPLIER:
        factor = multiplier(left.scale, right.scale, output.scale)
        assert partial_factors(factor, 1) == [factor]
        return scalar.requantize_multiplier_scalar(totals[0][0], factor, output.format)
    (first, unit), *rest = totals
    return scalar.requantize_divide_scalar(first, unit, rest, output.scale, output.format)


STEPS = (
    Multiply(output="y", left="a", right="b"),
    Multiply(output="y", left="a", right="row"),
    Multiply(output="y", left="column", right="row"),
    Multiply(output="y", left="number", right="a"),
)
FORMS = [
    *((formats, Requantize.DIVIDE) for formats in itertools.product(FORMATS, repeat=3)),
    *((formats, Requantize.MULTIPLIER) for formats in itertools.product(FORMATS[:4], repeat=3)),
]


@pytest.mark.parametrize(("formats", "requantize"), FORMS, ids=str)
def test_elementwise_products_are_the_scalar_twin_number_by_number(formats, requantize):
    step = STEPS[sum(len(f.name) for f in formats) % len(STEPS)]
    plan = planned(step, formats, requantize)
    given = integers(plan, 1, 12)
    found = simulated(plan, given)
    left, right = (np.broadcast_to(given[name].numpy(), found.shape) for name in (step.left, step.right))
    expected = [multiplied(plan, int(a), int(b)) for a, b in zip(left.flat, right.flat, strict=True)]
    assert found.flatten().tolist() == expected


def test_a_product_of_16_bits_is_rounded_once():
    """Two planes of the right operand would round apart, and drop the product of low planes."""
    step = STEPS[0]
    plan = planned(step, (INT16, INT16), Requantize.MULTIPLIER)
    given = integers(plan, 2, 400)
    found = simulated(plan, given)
    scales = [plan.tensors[name].scale for name in ("a", "b", "y")]
    exact = given["a"].double().numpy() * given["b"].double().numpy() * scales[0] * scales[1] / scales[2]
    assert np.abs(found - exact.clip(-32768, 32767)).max() <= 0.51
    (part,) = plan.products["y"].accumulators
    assert part.bound == 2**30 < plan.products["y"].limit


@pytest.mark.parametrize("bound", [2**20, 2**24, 2**30, 2**40])
def test_products_are_exact_integers(bound):
    generator = torch.Generator().manual_seed(0)
    size = int(bound**0.5)
    left, right = (torch.randint(-size, size + 1, (500,), generator=generator) for _ in range(2))
    left[0], right[0] = size, size - 1
    found = integer_multiply(left.float(), right.float(), bound)
    assert [int(q) for q in found.double()] == (left * right).tolist()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("right", ["b", "like_a"])
@pytest.mark.parametrize("kind", [Add, Subtract])
def test_sums_and_differences_are_the_scalar_twin(kind, right, fmt):
    step = kind(output="y", left="a", right=right)
    plan = planned(step, (fmt, fmt), Requantize.DIVIDE, 3)
    given, sign = integers(plan, 4, 30), 1 if kind is Add else -1
    found, grid = simulated(plan, given), plan.tensors["a"]
    ones = np.array([[start <= j < stop for j in range(4)] for start, stop in LIKE_A.ones]) * 1
    others = given[right].numpy() if right == "b" else np.broadcast_to(ones, found.shape)
    other = plan.tensors[right] if right == "b" else Quantization(format=INT8, scale=1.0)
    assert right == "b" or plan.term_grid(step) == other
    for a, b, y in zip(given["a"].numpy().flat, others.flat, found.flat, strict=True):
        (first, unit), *rest = scalar.planes_scalar(int(a), grid.scale, grid.format)
        rest += [(q, sign * s) for q, s in scalar.planes_scalar(int(b), other.scale, other.format)]
        expected = scalar.requantize_divide_scalar(
            first, unit, rest, plan.tensors["y"].scale, plan.tensors["y"].format
        )
        assert y == expected


@pytest.mark.parametrize("formats", list(itertools.product(FORMATS, repeat=2)), ids=str)
def test_exponentials_are_the_scalar_twin(formats):
    plan = planned(Exponential(output="y", source="a"), formats, Requantize.DIVIDE, 5)
    given = {"a": -integers(plan, 6)["a"].abs().clamp(max=formats[0].maximum)}
    found, (source, result) = simulated(plan, given), (plan.tensors[name] for name in ("a", "y"))
    for q, y in zip(given["a"].numpy().flat, found.flat, strict=True):
        x = scalar.dequantize_scalar(int(q), source.scale, source.format)
        assert y == scalar.quantize_exponential_scalar(x, result.scale, result.format)


def test_moves_keep_every_integer():
    step = Transpose(output="y", source="a")
    plan = planned(step, (INT16, INT16), Requantize.MULTIPLIER)
    given = integers(plan, 7)
    assert np.array_equal(simulated(plan, given), given["a"].mT.numpy())
    masked = Mask(output="y", source="column", constant="like_a")
    plan = planned(masked, (INT8, INT8), Requantize.MULTIPLIER)
    given = integers(plan, 8)
    ones = np.array([[start <= j < stop for j in range(4)] for start, stop in LIKE_A.ones])
    assert np.array_equal(simulated(plan, given), given["column"].numpy() * ones)


# Intervals.

BOUNDED = (
    *STEPS,
    Subtract(output="y", left="a", right="b"),
    Subtract(output="y", left="a", right="like_a"),
    Add(output="y", left="a", right="like_a"),
    MatMul(output="y", left="a", right="ones"),
    Exponential(output="y", source="a"),
)


def small(plan: LayerPlan, limits: dict[str, float], count: int) -> dict[str, torch.Tensor]:
    """Values inside the limits, most of them at an end."""
    rng = np.random.default_rng(9)
    return {
        given.name: torch.from_numpy(
            limits[given.name] * rng.choice([-1, -1, 1, 1, 0, 0.3], size=(count, *given.shape[1:]))
        ).float()
        for given in plan.program.inputs
    }


@pytest.mark.parametrize(
    ("formats", "requantize"),
    [
        ((INT4, INT4), Requantize.MULTIPLIER),
        ((INT8, INT8), Requantize.MULTIPLIER),
        ((INT8, INT16, INT8), Requantize.MULTIPLIER),
        ((INT16, INT16), Requantize.DIVIDE),
        ((INT8X2, INT8X2), Requantize.DIVIDE),
    ],
    ids=str,
)
@pytest.mark.parametrize("step", BOUNDED, ids=lambda step: f"{type(step).__name__}-{'-'.join(step.inputs)}")
def test_no_integer_leaves_its_interval_and_the_ends_are_attained(step, formats, requantize):
    plan = planned(step, formats, requantize, 10)
    limits = {given.name: 0.7 * plan.tensors[given.name].limit for given in plan.program.inputs}
    ends, seen = {}, {}
    propagate(plan, limits, lambda name, low, high: ends.__setitem__(name, (low, high)))
    evaluate(plan, small(plan, limits, 4000), seen.__setitem__)
    for name, (low, high) in ends.items():
        assert (low <= seen[name]).all(), name
        assert (seen[name] <= high).all(), name
        # Two planes lose the product of the low ones, and are bounded each by itself.
        if plan.tensors[name].format.planes == 1:
            assert torch.equal(seen[name].amax(0), high[0].float()), name
            assert torch.equal(seen[name].amin(0), low[0].float()), name


def test_a_narrower_interval_would_be_left():
    """The ends are sharp: one step less in a limit of an input is seen in the result."""
    plan = planned(STEPS[0], (INT8, INT8), Requantize.MULTIPLIER, 10)
    limits = {name: 0.7 * plan.tensors[name].limit for name in "ab"}
    less = {name: 0.6 * plan.tensors[name].limit for name in "ab"}
    ends, seen = {}, {}
    propagate(plan, less, lambda name, low, high: ends.__setitem__(name, (low, high)))
    evaluate(plan, small(plan, limits, 50), seen.__setitem__)
    assert (seen["y"] > ends["y"][1]).any()


# Constants in sums.


@pytest.mark.parametrize(
    ("fmt", "scale", "own"),
    [
        (INT8, float32(1 / 127), True),
        (INT8, 2.0**-6, True),
        (INT16, float32(1 / 32767), True),
        # 128 is beyond the format; 0.3 is no reciprocal.
        (INT8, 2.0**-7, False),
        (INT8, float32(0.3), False),
        (INT8X2, float32(1 / 127), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [Add, Subtract])
def test_a_constant_takes_the_grid_of_what_it_is_added_to_where_that_has_one(kind, fmt, scale, own):
    step = kind(output="y", left="a", right="like_a")
    grid = Quantization(format=fmt, scale=scale)
    plan = planned(step, (fmt, fmt), Requantize.DIVIDE, 3)
    plan = LayerPlan(program=plan.program, tensors=dict.fromkeys("ay", grid), requantize=plan.requantize)
    assert (plan.term_grid(step) == grid) == own
    assert not own or not is_far(step, plan.tensors)
    ones = np.array([[start <= j < stop for j in range(4)] for start, stop in LIKE_A.ones])
    given, seen = integers(plan, 4, 30)["a"] * 0.4 // 1, {}
    reals = torch.from_numpy((given.numpy() * np.float32(scale)).astype(np.float32))
    evaluate(plan, {"a": reals}, seen.__setitem__)
    sign = 1 if kind is Add else -1
    total = (seen["a"].numpy() * np.float32(scale) + sign * ones.astype(np.float32)) / np.float32(scale)
    if fmt.planes == 1:
        assert np.array_equal(seen["y"].numpy(), np.rint(total).clip(fmt.minimum, fmt.maximum))


# Who refuses what.


@pytest.mark.parametrize(
    ("check", "step", "words"),
    [
        (hexagon.check_plan, BOUNDED[0], "how Hexagon rounds step 'y' is not known"),
        (hexagon.check_plan, BOUNDED[4], "how Hexagon rounds step 'y' is not known"),
        (hexagon.check_plan, BOUNDED[8], "how Hexagon rounds step 'y' is not known"),
        # The constant has the scale 1, which is none of these.
        (hexagon.check_plan, BOUNDED[6], "how Hexagon rounds step 'y' is not known"),
        (tflite.check_plan, BOUNDED[4], "how TFLite rounds step 'y' is not known"),
        (tflite.check_plan, BOUNDED[8], "how TFLite rounds step 'y' is not known"),
    ],
)
def test_processors_refuse_kinds_whose_rounding_is_not_known(check, step, words):
    with pytest.raises(PlanError, match=words):
        check(planned(step, (INT8, INT8), Requantize.MULTIPLIER, 11))


def test_tflite_sees_the_grid_of_a_constant():
    plan = planned(BOUNDED[6], (INT8, INT8), Requantize.MULTIPLIER, 11)
    tflite.check_plan(plan)
    fine = {name: Quantization(format=INT8, scale=2.0**-30) for name in plan.tensors}
    far = LayerPlan(program=plan.program, tensors=fine, requantize=plan.requantize)
    with pytest.raises(PlanError, match="TFLite does not sum on the grids of step 'y'"):
        tflite.check_plan(far)


@pytest.mark.parametrize("step", BOUNDED, ids=lambda step: type(step).__name__)
def test_operators_of_a_chip_are_counted_for_every_kind(step):
    plan = planned(step, (INT8, INT8), Requantize.MULTIPLIER, 11)
    kinds = [operator.kind for operator in operators(plan, 8)]
    assert kinds[-1] is (Kind.PRODUCT if isinstance(step, MatMul) else Kind.ELEMENTWISE)
    # A sum of grids that are far apart is preceded by a product with the identity.
    assert len(kinds) == 1 + is_far(step, plan.tensors) * (not isinstance(step, Multiply))
    assert plan.cost() > 0
