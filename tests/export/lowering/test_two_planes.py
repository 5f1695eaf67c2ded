"""Two planes: a rescaling onto its own grid keeps every integer, in simulations and in graphs."""

from __future__ import annotations

import pytest
import torch
from inverse_programs import inverse_program

import qinvert
from qinvert.execution.simulator import simulate_integers
from qinvert.formats import INT8X2
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import MATRIX
from qinvert.program.steps import Add, Rescale
from qinvert.stress import stress_matrices
from qinvert.systems import Systems

SCALE = 2.0**-10
#: Steps whose integers round to others when they are rounded again: 128.3 is (1, -128), 128 is (0, 127).
TIES = [128.3, -127.8, 640.3, 384.2, -383.7, 127.0, 129.0]


def planned(*steps) -> Plan:
    program = inverse_program(*steps, chunk=8)
    grid = Quantization(format=INT8X2, scale=SCALE)
    layer = LayerPlan(
        program=program, tensors=dict.fromkeys(program.tensors, grid), requantize=Requantize.DIVIDE
    )
    return Plan(layers={"layer": layer}, target="int-ops")


def ties() -> torch.Tensor:
    lower = torch.zeros(1, 8, 8)
    lower[0, -1, :7] = -torch.tensor(TIES) * SCALE
    return lower


@pytest.mark.parametrize("name", ["inner", "result"])
def test_a_rescaling_onto_its_own_grid_keeps_every_integer(name, tmp_path):
    steps = [Rescale(output="kept", source=MATRIX)]
    if name == "inner":
        steps.append(Add(output="sum", left="kept", right=MATRIX))
    plan, lower, seen = planned(*steps), ties(), {}
    simulate_integers(plan.layer(), Systems(lower=lower), seen.__setitem__)
    assert set(seen[MATRIX].flatten().tolist()) >= {128.0, 640.0, 384.0}
    assert torch.equal(seen["kept"], seen[MATRIX])
    qinvert.export(plan, tmp_path / "t.onnx", batch=1)
    assert all(result.mismatches == 0 for result in qinvert.verify(tmp_path / "t.onnx", plan, lower))


@pytest.mark.parametrize("base", [1, 2])
def test_merges_from_one_and_two_agree_on_every_value(base, tmp_path):
    # Values that are few steps apart, so that every second plane takes all of its integers.
    lower = torch.cat([stress_matrices(name, 16, 16, 5) for name in ("half_random", "correlated_keys")])
    program = qinvert.block_merge(16, base)
    plan = qinvert.calibrate(lower, method=program, bits="8x2", scales="pow2", min_sqnr_db=0)
    grid = plan.layer().input
    steps = torch.tril(
        torch.randint(-2000, 2000, (64, 16, 16), generator=torch.Generator().manual_seed(0)), -1
    )
    exact = steps * grid.scale
    qinvert.export(plan, tmp_path / "t.onnx", batch=16)
    for given in (lower, exact, exact + 0.3 * grid.scale):
        given = torch.tril(given.to(torch.float32), -1)
        assert all(result.mismatches == 0 for result in qinvert.verify(tmp_path / "t.onnx", plan, given))


def test_the_proof_sees_the_low_plane():
    # 128 of the low plane's steps saturate at 127, wherever the high plane stands.
    plan = planned(Add(output="doubled", left=MATRIX, right=MATRIX)).layer()
    few, many = plan.proof(60 * SCALE), plan.proof(100 * SCALE)
    assert "doubled" in few.cannot_saturate
    assert "doubled" not in many.cannot_saturate
    assert MATRIX in few.cannot_saturate
