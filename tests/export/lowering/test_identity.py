from __future__ import annotations

import numpy as np
import pytest
import torch
from inverse_programs import inverse_program

import qinvert
from qinvert.export.exporting import build
from qinvert.export.runtimes.onnxruntime_cpu import open_session
from qinvert.formats import INT8, INT16, IntFormat
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import MATRIX
from qinvert.program.program import Program
from qinvert.program.sparsity import zero_diagonals
from qinvert.program.steps import Add, Axis, Concat, Constant, Mask, MatMul, Rescale, Slice
from qinvert.stress import stress_matrices

PROGRAMS = [
    qinvert.block_merge(16, base=4),
    qinvert.block_merge(16, base=2, tile=8),
    qinvert.block_merge(16, base=1, layout="masked", corrections=1),
    qinvert.neumann_doubling(16),
    qinvert.banded_residual(16, 3, 4),
    qinvert.block_merge(16, factored=True),
]
LOWER = torch.cat([stress_matrices(name, 80, 16) for name in ("correlated_keys", "half_random")])
PROFILES = ("npu-qdq-int8", "npu-qdq-uint8", "qlinear")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.title)
def test_what_counts_as_strictly_lower_is_so_for_every_input(program):
    found, tensors = zero_diagonals(program), {}
    program.run(LOWER, torch.float64, observe=tensors.__setitem__, beta=torch.ones(LOWER.shape[:-1]))
    assert {MATRIX, program.inverse_ports.result} <= found
    for name in found:
        assert not torch.triu(tensors[name]).any(), name
    square = {name for name, shape in program.shapes.items() if shape.rows == shape.columns}
    # The other way round: what looks strictly lower on all of them is found.
    for name in square - found:
        assert torch.triu(tensors[name]).any(), name


def with_grids(
    program: Program,
    scales: dict[str, float],
    others: float = 1 / 127,
    fmt: IntFormat = INT8,
    target: str = "npu-qdq-int8",
) -> qinvert.Plan:
    tensors = {
        name: Quantization(format=fmt, scale=float32(scales.get(name, others))) for name in program.tensors
    }
    layer = LayerPlan(program=program, tensors=tensors, requantize=Requantize.MULTIPLIER)
    return qinvert.Plan(layers={"layer": layer}, target=target)


def operators(model) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("program", PROGRAMS[:2], ids=lambda program: program.title)
def test_no_product_is_widened_where_one_fits_the_grid(profile, program, tmp_path):
    plan = with_grids(program, {})
    joins = sum(isinstance(step, Concat) for step in program.steps)
    model = qinvert.export(plan, tmp_path / "t.onnx", profile=profile, batch=20, chains=1)
    assert operators(model).count("Concat") == joins
    # T comes out of the integers: nothing is added to it.
    assert model.graph.node[-1].op_type == "DequantizeLinear"
    for result in qinvert.verify(tmp_path / "t.onnx", plan, LOWER):
        assert result.mismatches == 0
    # 1.0 beyond the largest integer: blocks of identities instead.
    wide = with_grids(program, {}, others=1 / 131)
    model = qinvert.export(wide, tmp_path / "t.onnx", profile=profile, batch=20, chains=1)
    assert operators(model).count("Concat") > joins
    assert model.graph.node[-1].op_type == "Add"
    for result in qinvert.verify(tmp_path / "t.onnx", wide, LOWER):
        assert result.mismatches == 0


@pytest.mark.parametrize("integer", [41, 109])
def test_a_diagonal_that_would_not_be_one_is_added_in_float32(integer, tmp_path):
    assert np.float32(integer) * np.float32(1 / integer) != 1
    plan = with_grids(PROGRAMS[0], {}, others=1 / integer)
    model = qinvert.export(plan, tmp_path / "t.onnx", batch=20)
    assert model.graph.node[-1].op_type == "Add"
    for result in qinvert.verify(tmp_path / "t.onnx", plan, LOWER):
        assert result.mismatches == 0


def everything_reads_an_identity() -> Program:
    """Every kind of step reads a tensor that is stored with an identity, and parts of it."""
    half = ((0, 8), (8, 16))
    mask = Constant(name="left_half", rows=16, columns=16, ones=((0, 8),) * 16)
    steps = (
        MatMul(output="P", left=MATRIX, right=MATRIX),
        MatMul(output="S", left=MATRIX, right="P", add=("P", MATRIX)),
        MatMul(output="square", left="S", right="S"),
        MatMul(output="twice", left="S", right="S", add=("S", "S")),
        MatMul(output="less", left="S", right=MATRIX, add=(MATRIX,), subtract=("S",)),
        Mask(output="masked", source="S", constant="left_half"),
        Rescale(output="rescaled", source="S", factor=0.5),
        *(Slice(output=f"rows_{i}", source="S", rows=rows) for i, rows in enumerate(half)),
        Concat(output="rows", sources=("rows_0", "rows_1"), axis=Axis.ROWS),
        Slice(output="top", source="S", rows=(0, 8)),
        Slice(output="bottom", source=MATRIX, rows=(8, 16)),
        # A quarter of the diagonal is in it: neither an identity nor nothing.
        Concat(output="mixed", sources=("top", "bottom"), axis=Axis.ROWS),
        MatMul(output="of_mixed", left="mixed", right="rows", add=("rows",)),
        Concat(output="stack", sources=("S", MATRIX), axis=Axis.BLOCKS),
        Slice(output="first", source="stack", blocks=(0, 1)),
        Add(output="a", left="square", right="twice"),
        Add(output="b", left="less", right="masked"),
        Add(output="c", left="rescaled", right="of_mixed"),
        Add(output="d", left="first", right="a"),
        Add(output="e", left="b", right="c"),
        Add(output="result", left="d", right="e"),
    )
    return inverse_program(*steps, name="readers", chunk=16, constants=(mask,), output="result")


@pytest.mark.parametrize("profile", PROFILES)
def test_readers_of_every_kind_get_the_tensor_of_the_program(profile, tmp_path):
    program = everything_reads_an_identity()
    # Odd reciprocals: no sum of float32 lies halfway between two integers of the result.
    plan = with_grids(program, dict.fromkeys("abcde", 1 / 31) | {"result": 1 / 17})
    qinvert.export(plan, tmp_path / "t.onnx", profile=profile, batch=20)
    for result in qinvert.verify(tmp_path / "t.onnx", plan, LOWER):
        assert result.mismatches == 0


def test_a_product_of_identities_must_be_one_on_the_grid_of_the_result():
    program = qinvert.block_merge(16, base=4, layout="masked")
    last = program.steps[-1]
    plan = with_grids(program, {last.output: 1 / 131})
    nodes = {node.name: node for node in build(plan, batch=1).graph.node}
    # No operand takes an identity, both residuals widen the product.
    parts = nodes[f"{last.output}/left/float"].input
    assert len(parts) == 3
    assert parts[0] == parts[2]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("program", PROGRAMS[:3], ids=lambda program: program.title)
def test_integers_that_a_graph_returns_hold_no_identity(profile, program, tmp_path):
    plan = with_grids(program, {})
    model = qinvert.export(plan, tmp_path / "t.onnx", profile=profile, batch=20, output="integers")
    assert any("plus_identity" in node.name for node in model.graph.node)
    for result in qinvert.verify(tmp_path / "t.onnx", plan, LOWER):
        assert result.mismatches == 0


def test_int16_carries_the_identity_where_its_planes_hold_it(tmp_path):
    program = PROGRAMS[1]
    joins = sum(isinstance(step, Concat) for step in program.steps)
    # 127 * 256 is the largest integer that the high plane of a right operand holds.
    for integer, widened in ((32255, False), (32513, True)):
        plan = with_grids(program, {}, others=1 / integer, fmt=INT16, target="npu-qdq-int16")
        model = qinvert.export(plan, tmp_path / "t.onnx", batch=20)
        assert (operators(model).count("Concat") > joins) == widened
        for result in qinvert.verify(tmp_path / "t.onnx", plan, LOWER):
            assert result.max_steps <= 8.5


def test_a_model_of_functions_with_an_open_batch_carries_the_identity(tmp_path):
    plan = with_grids(PROGRAMS[1], {})
    qinvert.export_layers(plan, tmp_path / "t.onnx", batch=None)
    session = open_session((tmp_path / "t.onnx").read_bytes())
    for count in (1, 3):
        lower = LOWER[:count].to(torch.float32)
        (found,) = session.run(None, {"layer/L": lower.numpy()[None]})
        assert torch.equal(torch.from_numpy(found[0]), plan.layer().inverse(lower))
