"""Which differences float32 sums can cause, by ties that a program amplifies, and by wrong programs."""

from functools import cache

import numpy as np
import onnx
import pytest
import torch
from inverse_programs import inverse_program

import qinvert
from qinvert.errors import VerificationError
from qinvert.execution.simulator import evaluate
from qinvert.execution.tensors import constant_matrix
from qinvert.export.verification.reach import ReachEvaluator, reach
from qinvert.formats import INT8, INT16
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import MATRIX
from qinvert.program.steps import (
    Add,
    Constant,
    Exponential,
    MatMul,
    Multiply,
    Slice,
    Subtract,
    Transpose,
)
from qinvert.proof.interval_arithmetic import split
from qinvert.stress import stress_matrices
from qinvert.systems import Systems

CHUNK = 16
#: Steps of the accumulator in one step of the square's grid: one value in 22 is a tie.
TIES = 22
ORDERS = {"right": (MATRIX, "square"), "left": ("square", MATRIX)}


def planned(target="npu-qdq-int8", order="right"):
    """``S = M M^2``, or ``M^2 M``: its square has many ties, and its result multiplies a step of them."""
    left, right = ORDERS[order]
    steps = (
        MatMul(output="square", left=MATRIX, right=MATRIX),
        MatMul(output="S", left=left, right=right),
    )
    program = inverse_program(*steps, chunk=CHUNK)
    one = float32(0.01)
    square = float32(TIES * one * one)
    scales = {MATRIX: one, "square": square, "S": float32(40 * one * square)}
    grids = {name: Quantization(format=INT8, scale=scales[name]) for name in program.tensors}
    layer = LayerPlan(program=program, tensors=grids, requantize=Requantize.MULTIPLIER)
    return Plan(layers={"layer": layer}, target=target)


def matrices(count=64):
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-20, 21, (count, CHUNK, CHUNK), generator=generator)
    return torch.tril(integers * torch.tensor(float32(0.01)), -1)


@pytest.mark.parametrize("target", ["npu-qdq-int8", "npu-qdq-uint8"])
def test_ties_that_a_program_amplifies_are_allowed(target, tmp_path):
    plan, lower = planned(target), matrices()
    qinvert.export(plan, tmp_path / "t.onnx", batch=8)
    results = qinvert.verify(tmp_path / "t.onnx", plan, lower)
    assert any(result.mismatches > 1e-4 * result.values for result in results)
    assert all(result.beyond == 0 and result.max_steps <= result.allowed_steps + 0.5 for result in results)


@pytest.mark.parametrize(("target", "differs"), [("npu-qdq-int8", False), ("npu-qdq-int16", True)])
def test_right_exports_pass_on_matrices_of_another_kind(target, differs, tmp_path):
    """The pair of sets on which ties made `verify` refuse a right graph."""
    given, found = [stress_matrices(name, 128, CHUNK) for name in ("filled_blocks", "per_channel_decay")]
    plan = qinvert.calibrate(given, target=target, bits=16 if differs else 8, min_sqnr_db=0)
    qinvert.export(plan, tmp_path / "t.onnx", batch=8)
    results = qinvert.verify(tmp_path / "t.onnx", plan, found)
    assert all(result.beyond == 0 for result in results)
    assert any(result.mismatches for result in results) == differs


def other_order(plan, path):
    other = planned(plan.target, "left")
    qinvert.export(other, path, batch=8, chains=1)


def other_scale(plan, path):
    """A scale of another program, off by 2 percent."""
    model = qinvert.export(plan, path, batch=8, chains=1)
    square = plan.layer().tensors["square"].scale
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.size == 1 and array.reshape(()) == np.float32(square):
            tensor.CopyFrom(onnx.numpy_helper.from_array(array * np.float32(1.02), tensor.name))
    onnx.save(model, path)


def shifted(plan, path):
    """All values a twentieth of a step higher, which only those near a boundary show."""
    model = qinvert.export(plan, path, batch=8, chains=1)
    add = onnx.helper.make_node("Add", ["S/float", "shift"], ["S/shifted"], name="shift")
    shift = np.full((1, 1, 1, 1), 0.05 * plan.layer().output.scale, np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(shift, "shift"))
    (at,) = [i for i, node in enumerate(model.graph.node) if "S/float" in node.input]
    model.graph.node[at].input[0] = "S/shifted"
    model.graph.node.insert(at, add)
    onnx.save(model, path)


@pytest.mark.parametrize("wrong", [other_order, other_scale, shifted])
def test_another_program_of_the_same_size_is_refused(wrong, tmp_path):
    plan = planned()
    wrong(plan, tmp_path / "t.onnx")
    with pytest.raises(VerificationError, match="differs from the simulator"):
        qinvert.verify(tmp_path / "t.onnx", plan, matrices(), layer="layer")


@pytest.mark.parametrize("method", ["auto", "newton_schulz", "column_sweep", "neumann_doubling"])
@pytest.mark.parametrize("name", ["filled_blocks", "correlated_keys", "negative_eigenvalues"])
def test_few_values_of_stress_matrices_can_differ(method, name):
    lower = stress_matrices(name, 4, CHUNK)
    plan = qinvert.calibrate(lower, method=method, target="npu-qdq-int8", min_sqnr_db=0).layer()
    assert (reach(plan, Systems(lower=lower)) > 0).mean() < 1 / 32


def test_the_reach_holds_for_sums_in_any_order():
    plan = planned().layer()
    lower = matrices(16)
    reached = reach(plan, Systems(lower=lower))
    expected = plan.inverse(lower).numpy()
    grids = {name: np.float32(grid.scale) for name, grid in plan.tensors.items()}
    generator, differing = np.random.default_rng(0), 0
    for _ in range(20):
        order = generator.permutation(CHUNK)
        m = -lower.numpy()
        square = stored(summed(m, m, order), grids["square"])
        result = stored(summed(m, square, order), grids["S"]) + np.eye(CHUNK, dtype=np.float32)
        steps = np.abs(result - expected) / grids["S"]
        assert (steps <= reached + 2**-8).all()
        differing += int((steps > 0.5).sum())
    assert differing
    assert (reached > 0).mean() < 0.5


def summed(left, right, order):
    """``left @ right`` in float32, one term after the other."""
    total = np.zeros_like(left)
    for k in order:
        total += left[:, :, k, None] * right[:, None, k, :]
    return total


def stored(value, scale):
    return (np.clip(np.rint(value / scale), -128, 127) * scale).astype(np.float32)


# 16 bits, whose sums float32 does not always hold.


@cache
def wide(scales, target="npu-qdq-int16", kind="random"):
    """A plan of 16 bits, and matrices that it was not calibrated on."""
    generator = torch.Generator().manual_seed(3)
    lower = torch.tril(torch.rand(24, 32, 32, generator=generator), -1)
    lower = stress_matrices(kind, 24, 32) if kind != "random" else lower
    options = {"method": "block_merge", "bits": 16, "target": target, "min_sqnr_db": 0}
    return qinvert.calibrate(lower[:8], scales=scales, **options), lower[8:]


@pytest.mark.parametrize("target", ["npu-qdq-int16", "hexagon-int16"])
@pytest.mark.parametrize("kind", ["random", "half_random", "correlated_keys"])
def test_differences_of_16_bits_stay_within_their_reach(target, kind, tmp_path):
    """Also on random L, whose inverses grow: how far is proved value by value."""
    plan, lower = wide("float", target, kind)
    qinvert.export(plan, tmp_path / "t.onnx", batch=8)
    results = qinvert.verify(tmp_path / "t.onnx", plan, lower)
    assert all(result.beyond == 0 and result.mismatches <= result.values / 16 for result in results)


def test_some_value_of_16_bits_differs_with_float_scales(tmp_path):
    """The tolerance is needed: no test of it would fail if nothing ever differed."""
    plan, lower = wide("float")
    qinvert.export(plan, tmp_path / "t.onnx", batch=8)
    results = qinvert.verify(tmp_path / "t.onnx", plan, lower)
    assert any(result.mismatches for result in results)


@pytest.mark.parametrize("kind", ["half_random", "correlated_keys"])
def test_powers_of_two_are_bit_for_bit_where_sums_stay_below_24_bits(kind, tmp_path):
    plan, lower = wide("pow2", kind=kind)
    reached = reach(plan.layer(), Systems(lower=lower))
    assert (reached > 0).mean() < 0.01
    qinvert.export(plan, tmp_path / "t.onnx", batch=8)
    assert all(not result.mismatches for result in qinvert.verify(tmp_path / "t.onnx", plan, lower))


def test_sums_beyond_24_bits_are_opened_under_powers_of_two_too():
    plan = wide_square(2.0**-15)
    full = (0.9 + 0.1 * torch.rand(8, CHUNK, CHUNK, generator=torch.Generator().manual_seed(0))).tril(-1)
    assert reach(plan, Systems(lower=full)).any()
    # 14 products of 2^10 by 2^7 and by 2^7 stay below.
    assert not reach(plan, Systems(lower=full / 64)).any()


def wide_square(scale):
    """``S = M^2`` on 16 bits."""
    program = inverse_program(MatMul(output="S", left=MATRIX, right=MATRIX), chunk=CHUNK)
    grids = {
        MATRIX: Quantization(format=INT16, scale=scale),
        "S": Quantization(format=INT16, scale=16 * scale),
    }
    return LayerPlan(program=program, tensors=grids, requantize=Requantize.MULTIPLIER)


def other_method(plan, path):
    """Another exact algorithm, calibrated on the same matrices."""
    options = {"bits": 16, "target": plan.target, "min_sqnr_db": 0}
    other = qinvert.calibrate(wide("float")[1], method="elimination", **options)
    qinvert.export(other, path, batch=8)


def one_scale_off(plan, path):
    """The scale of one product, off by one step in 1,000: less than half a step of most integers."""
    model = qinvert.export(plan, path, batch=8, chains=1)
    name = next(s.output for s in plan.layer().program.steps if isinstance(s, MatMul))
    scale = np.float32(plan.layer().tensors[name].scale)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.size == 1 and array.reshape(()) == scale:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array * np.float32(1.001), tensor.name))
    onnx.save(model, path)


def one_step_up(plan, path):
    """Every value of T one step of its 16 bits higher: eight times less than was allowed once."""
    model = qinvert.export(plan, path, batch=8, chains=1)
    (result,) = (value.name for value in model.graph.output)
    for node in model.graph.node:
        node.output[:] = ["unshifted" if name == result else name for name in node.output]
    step = np.full((1, 1, 1, 1), plan.layer().output.scale, np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(step, "shift"))
    model.graph.node.append(onnx.helper.make_node("Add", ["unshifted", "shift"], [result], name="shift"))
    onnx.save(model, path)


@pytest.mark.parametrize("wrong", [other_method, one_scale_off, one_step_up])
def test_another_program_of_16_bits_is_refused(wrong, tmp_path):
    plan, lower = wide("float")
    wrong(plan, tmp_path / "t.onnx")
    with pytest.raises(VerificationError, match="differs from the simulator"):
        qinvert.verify(tmp_path / "t.onnx", plan, lower, layer="layer")


# Every kind of step.


@pytest.mark.parametrize("fmt", [INT8, INT16], ids=str)
@pytest.mark.parametrize("scales", ["float", "pow2"])
@pytest.mark.parametrize(
    "step",
    [
        Subtract(output="S", left=MATRIX, right="turned"),
        Subtract(output="S", left="turned", right="ones"),
        Add(output="S", left="turned", right="ones"),
        Multiply(output="S", left=MATRIX, right="turned"),
        Multiply(output="S", left=MATRIX, right="row"),
        MatMul(output="S", left="turned", right="ones"),
        Exponential(output="S", source="negative"),
    ],
    ids=lambda step: type(step).__name__,
)
def test_every_kind_holds_the_float32_values_of_any_library(step, scales, fmt):
    """Values of NumPy in float32, each operation off by up to its unit in the last place."""
    triangle = Constant(name="ones", rows=8, columns=8, ones=tuple((0, i + 1) for i in range(8)))
    before = (
        Transpose(output="turned", source=MATRIX),
        Slice(output="row", source="turned", rows=(0, 1)),
        Multiply(output="negative", left=MATRIX, right="turned"),
    )
    program = inverse_program(*before, step, chunk=8, constants=(triangle,), output=None)
    rng, tensors = np.random.default_rng(0), {}
    for name in program.tensors:
        scale = float(np.exp(rng.normal() / 3)) / fmt.largest
        tensors[name] = float32(2.0 ** round(np.log2(scale)) if scales == "pow2" else scale)
    tensors |= dict.fromkeys(("turned", "row"), tensors[MATRIX])
    grids = {name: Quantization(format=fmt, scale=scale) for name, scale in tensors.items()}
    plan = LayerPlan(program=program, tensors=grids, requantize=Requantize.MULTIPLIER)
    given = torch.rand(40, 8, 8) - 0.5
    evaluator, ends, middle = ReachEvaluator(plan, 40), {}, {}
    interval = {MATRIX: evaluator.given(MATRIX, given, from_keys=False)}
    program.evaluate(evaluator, interval, lambda n, x: ends.__setitem__(n, [end.numpy() for end in split(x)]))
    evaluate(plan, {MATRIX: given}, lambda n, x: middle.__setitem__(n, x.numpy()))
    for name, (low, high) in ends.items():
        assert ((low <= middle[name]) & (middle[name] <= high)).all(), name
    if scales == "pow2" and not isinstance(step, Exponential):
        assert all((low == high).all() for low, high in ends.values())
    names = [name for name in step.inputs if name != "ones"]
    reals = [middle[name].astype(np.float32) * np.float32(grids[name].scale) for name in names]
    reals += [constant_matrix(triangle).numpy()] * (len(step.inputs) - len(reals))
    exact = OPERATORS[type(step)](*(real.astype(np.float64) for real in reals))
    wobble = 1 + rng.uniform(-1, 1, exact.shape) * 2.0**-24
    found = np.rint((exact * wobble).astype(np.float32) / np.float32(grids["S"].scale))
    found = np.clip(found, fmt.minimum, fmt.maximum)
    if scales == "float":
        low, high = ends["S"]
        assert ((low <= found) & (found <= high)).all()


OPERATORS = {
    Subtract: np.subtract,
    Add: np.add,
    Multiply: np.multiply,
    MatMul: np.matmul,
    Exponential: np.exp,
}
