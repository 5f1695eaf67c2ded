"""Which differences float32 sums can cause, by ties that a program amplifies, and by wrong programs."""

import numpy as np
import onnx
import pytest
import torch
from inverse_programs import inverse_program

import qinvert
from qinvert.errors import VerificationError
from qinvert.export.verification.reach import reach
from qinvert.formats import INT8
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import MATRIX
from qinvert.program.steps import MatMul
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
    lower = qinvert.stress.stress_matrices(name, 4, CHUNK)
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
