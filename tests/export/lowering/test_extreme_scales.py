"""Plans whose scales are legal and random: graphs follow the simulator, near or far apart as they are."""

import numpy as np
import pytest
import torch
from inverse_programs import inverse_program

import qinvert
from qinvert.errors import PlanError
from qinvert.formats import INT8
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import MATRIX
from qinvert.program.steps import Add, MatMul, Rescale, Subtract

CHUNK = 16
PROFILES = ("npu-qdq-uint8", "npu-qdq-int8", "hexagon-uint8", "qlinear", "qlinear-uint8", "int-ops")


def drawn(target, seed):
    """A plan of products and sums, and matrices that fill its grid and leave it."""
    generator = np.random.default_rng(seed)
    last = (Add, Subtract)[seed % 2]
    program = inverse_program(
        MatMul(output="square", left=MATRIX, right=MATRIX),
        Rescale(output="turned", source=MATRIX, factor=float(generator.choice([1, -1, 2.5, -0.375]))),
        # The sum is the result, so that nothing hides what is wrong in it.
        last(output="S", left="turned", right="square"),
        chunk=CHUNK,
    )
    spread = generator.choice([1, 4, 9])
    scales = {name: 10.0 ** generator.uniform(-spread, spread) for name in program.tensors}
    if seed % 4 > 1:
        # Both terms far above the grid of their sum, where zero points that are folded lose the most.
        scales["S"] = min(scales["turned"], scales["square"]) / 10.0 ** generator.uniform(0, spread)
    grids = {name: Quantization(format=INT8, scale=float32(scale)) for name, scale in scales.items()}
    form = Requantize.DIVIDE if target == "int-ops" else Requantize.MULTIPLIER
    layer = LayerPlan(program=program, tensors=grids, requantize=form)
    integers = np.tril(generator.integers(-130, 131, (16, CHUNK, CHUNK)), -1).astype(np.float32)
    return Plan(layers={"layer": layer}, target=target), torch.from_numpy(integers * grids[MATRIX].scale)


@pytest.mark.parametrize("target", PROFILES)
def test_graphs_with_random_legal_scales_are_the_simulator(target, tmp_path):
    differing = 0
    for seed in range(16):
        plan, lower = drawn(target, seed)
        qinvert.export(plan, tmp_path / "t.onnx", batch=4)
        # Optimized and not.
        results = qinvert.verify(tmp_path / "t.onnx", plan, lower)
        differing += max(result.mismatches for result in results)
    # What is beyond the reach of float32 sums is refused; integer operators have no reach.
    assert differing <= (16 if "qdq" in target or target == "hexagon-uint8" else 0)


def test_scales_whose_product_overflows_are_no_plan():
    plan, _ = drawn("npu-qdq-uint8", 0)
    grids = dict(plan.layer().tensors)
    grids[MATRIX] = Quantization(format=INT8, scale=float32(1e15))
    grids["square"] = Quantization(format=INT8, scale=float32(1e-30))
    with pytest.raises(PlanError, match="overflow float32"):
        LayerPlan(program=plan.layer().program, tensors=grids, requantize=Requantize.MULTIPLIER)
