from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from inverse_programs import inverse_program

import qinvert
from qinvert.calibration.planning.scales import scale_groups
from qinvert.errors import InputError
from qinvert.execution.simulator import simulate_integers
from qinvert.formats import INT4, INT8, INT8X2, INT16
from qinvert.methods import (
    banded_residual,
    block_merge,
    column_sweep,
    forward_substitution,
    neumann,
    neumann_doubling,
    newton_schulz,
)
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import MATRIX
from qinvert.program.steps import Add, Concat, Mask, MatMul, Rescale, Slice
from qinvert.simulation import simulate_inverse
from qinvert.stress import stress_matrices
from qinvert.systems import Systems

PROGRAMS = {
    "packed": block_merge(16, 2),
    "base 8": block_merge(16, 8),
    "masked": block_merge(8, 2, layout="masked"),
    "tiled": block_merge(16, 1, tile=4),
    "corrected": block_merge(8, 4, corrections=2),
    "series": neumann(8, 5),
    "doubling": neumann_doubling(16),
    "banded": banded_residual(16, order=2, steps=5),
    "rows": forward_substitution(8),
    "columns": column_sweep(8),
}
TARGETS = {Requantize.DIVIDE: "int-ops", Requantize.MULTIPLIER: "npu-qdq-int8"}


@cache
def calibrated(name: str, requantize=Requantize.MULTIPLIER, data="half_random", **options) -> LayerPlan:
    program = PROGRAMS[name]
    lower = stress_matrices(data, 4, program.chunk)
    options = {"bits": 8, **options}
    plan = qinvert.calibrate(lower, method=program, target=TARGETS[requantize], **options).layer()
    assert plan.requantize is requantize
    return plan


def mixed() -> LayerPlan:
    formats = {"M": INT8, "power_2": INT16, "sum_2": INT16, "power_3": INT4}
    program = neumann(8, 3)
    tensors = {
        name: Quantization(
            format=formats.get(name, INT16),
            scale=float32(3 / formats.get(name, INT16).largest),
        )
        for name in program.tensors
    }
    return LayerPlan(program=program, tensors=tensors, requantize=Requantize.DIVIDE)


def observed(plan: LayerPlan, lower: torch.Tensor) -> dict[str, np.ndarray]:
    seen = {}
    simulate_integers(plan, Systems(lower=lower), lambda name, q: seen.update({name: q.numpy()}))
    assert all(np.array_equal(q, np.rint(q)) for q in seen.values())
    return {name: q.astype(np.int64) for name, q in seen.items()}


def single(values) -> np.ndarray:
    return np.asarray(values).astype(np.float32)


def rounded(x: np.ndarray, scale: float, fmt) -> np.ndarray:
    """What one QuantizeLinear gives, or two of them for two planes."""
    if fmt.planes == 1:
        return np.clip(np.rint(x / np.float32(scale)), fmt.minimum, fmt.maximum).astype(np.int64)
    high = rounded(x, 256 * scale, INT8)
    return 256 * high + rounded(x - single(high) * np.float32(256 * scale), scale, INT8)


def planes(q: np.ndarray, scale: float, fmt, right: bool = False) -> list[tuple[np.ndarray, np.float32]]:
    if right and fmt is INT16:
        return planes(rounded(single(q) * np.float32(scale), scale, INT8X2), scale, INT8X2)
    if fmt.planes == 1:
        return [(q, np.float32(scale))]
    low = (q + 128) % 256 - 128
    return [((q - low) // 256, np.float32(256 * scale)), (low, np.float32(scale))]


def residual(plan: LayerPlan, step: MatMul, name: str, q: np.ndarray, plane: int) -> np.ndarray:
    right = plan.tensors[step.right]
    partner = plan.tensors[step.left] if name == step.right else right
    one = round(1 / partner.scale)
    if right.format is not INT16:
        return one * q
    if name == step.right:
        return one * planes(q, right.scale, right.format, right=True)[plane][0]
    # Blocks of 127 * 256, and what remains.
    count, rest = divmod(one, 127 * 256)
    parts = planes(np.array(rest), right.scale, right.format, right=True)
    return q * int(parts[plane][0] + (127 * count if plane == 0 else 0))


def product(plan: LayerPlan, step: MatMul, q: dict[str, np.ndarray]) -> np.ndarray:
    grids = plan.tensors
    terms = [(name, 1) for name in step.add] + [(name, -1) for name in step.subtract]
    if plan.requantize is Requantize.MULTIPLIER:
        output, right = grids[step.output], grids[step.right]
        factor = np.float32(grids[step.left].scale) * np.float32(right.scale) / np.float32(output.scale)
        weights = (1,) if right.format is not INT16 else (256, 1)
        parts = []
        for i, weight in enumerate(weights):
            accumulator = q[step.left] @ planes(q[step.right], right.scale, right.format, right=True)[i][0]
            for name, sign in terms:
                accumulator = accumulator + sign * residual(plan, step, name, q[name], i)
            # One factor: the rounding of its steps is that of a grid of scale 1.
            parts.append(rounded(single(accumulator) * (factor * np.float32(weight)), 1.0, output.format))
        return np.clip(sum(parts), output.format.minimum, output.format.maximum)
    left = planes(q[step.left], grids[step.left].scale, grids[step.left].format)
    right = planes(q[step.right], grids[step.right].scale, grids[step.right].format, right=True)
    x = single(left[0][0] @ right[0][0]) * (left[0][1] * right[0][1])
    if len(left) == len(right) == 2:
        x = x + single(left[0][0] @ right[1][0] + left[1][0] @ right[0][0]) * (left[0][1] * right[1][1])
    elif len(left) == 2:
        x = x + single(left[1][0] @ right[0][0]) * (left[1][1] * right[0][1])
    elif len(right) == 2:
        x = x + single(left[0][0] @ right[1][0]) * (left[0][1] * right[1][1])
    for name, sign in terms:
        for plane, scale in planes(q[name], grids[name].scale, grids[name].format):
            x = x + single(plane) * (np.float32(sign) * scale)
    return rounded(x, grids[step.output].scale, grids[step.output].format)


def real(plan: LayerPlan, name: str, q: dict[str, np.ndarray]) -> list[np.ndarray]:
    grid = plan.tensors[name]
    return [single(plane) * scale for plane, scale in planes(q[name], grid.scale, grid.format)]


def recomputed(plan: LayerPlan, step, q: dict[str, np.ndarray], batch: int) -> np.ndarray:
    match step:
        case MatMul():
            return product(plan, step, q)
        case Add():
            parts = [*real(plan, step.left, q), *real(plan, step.right, q)]
            x = sum(parts[1:], parts[0])
        case Rescale():
            parts = real(plan, step.source, q)
            x = sum(parts[1:], parts[0]) * np.float32(step.factor)
        case Mask():
            (constant,) = [c for c in plan.program.constants if c.name == step.constant]
            kept = [[start <= j < stop for j in range(constant.columns)] for start, stop in constant.ones]
            return np.where(kept, q[step.source], 0)
        case Slice():
            blocks = [batch * b for b in step.blocks] if step.blocks else [None, None]
            spans = (blocks, step.rows or (None, None), step.columns or (None, None))
            return q[step.source][tuple(slice(*span) for span in spans)]
        case Concat():
            zeros = {c.name: (c.rows, c.columns) for c in plan.program.constants}
            blocks = batch * plan.program.shapes[step.output].blocks
            parts = [q[n] if n in q else np.zeros((blocks, *zeros[n]), dtype=np.int64) for n in step.sources]
            return np.concatenate(parts, axis=["blocks", "rows", "columns"].index(step.axis))
    output = plan.tensors[step.output]
    return rounded(x, output.scale, output.format)


def check_every_step(plan: LayerPlan, lower: torch.Tensor) -> None:
    seen = observed(plan, lower)
    assert tuple(seen) == plan.program.tensors
    grid = plan.input
    assert np.array_equal(seen[MATRIX], rounded(-lower.numpy(), grid.scale, grid.format))
    for step in plan.program.steps:
        assert np.array_equal(seen[step.output], recomputed(plan, step, seen, len(lower))), step.output


@pytest.mark.parametrize("scales", ["float", "pow2"])
@pytest.mark.parametrize("bits", [4, 16, "8x2"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_format_too(name, bits, scales):
    program = PROGRAMS[name]
    lower = stress_matrices("half_random", 7, program.chunk)
    plan = qinvert.calibrate(lower[:4], method=program, bits=bits, scales=scales).layer()
    assert plan.formats == {4: "int4", 16: "int16", "8x2": "int8x2"}[bits]
    check_every_step(plan, lower[4:])


@pytest.mark.parametrize("name", PROGRAMS)
def test_mixtures_of_one_and_two_planes_too(name):
    program = PROGRAMS[name]
    lower = stress_matrices("half_random", 7, program.chunk)
    plan = calibrated(name, Requantize.DIVIDE)
    generator = np.random.default_rng(0)
    kinds = (INT4, INT8, INT8X2, INT16)
    formats = {g: kinds[int(generator.integers(4))] for g in dict.fromkeys(scale_groups(program).values())}
    tensors = {
        name: Quantization(
            format=formats[group], scale=float32(plan.tensors[name].limit / formats[group].largest)
        )
        for name, group in scale_groups(program).items()
    }
    check_every_step(replace(plan, tensors=tensors), lower[4:])


@pytest.mark.parametrize("scales", ["float", "pow2"])
@pytest.mark.parametrize("requantize", Requantize)
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("data", ["half_random", "repeated_keys", "negative_eigenvalues"])
def test_every_step_is_exact_integer_arithmetic_and_one_float32_chain(name, requantize, data, scales):
    plan = calibrated(name, requantize, scales=scales)
    check_every_step(plan, stress_matrices(data, 3, plan.chunk, seed=1))


@pytest.mark.parametrize("name", ["packed", "corrected", "doubling"])
def test_int4_steps_too(name):
    plan = calibrated(name, Requantize.DIVIDE, bits=4)
    check_every_step(plan, stress_matrices("half_random", 3, plan.chunk, seed=1))


def test_mixed_formats_and_float64_accumulators_too():
    plan = mixed()
    assert plan.proof().accumulator_bound >= 2**24
    check_every_step(plan, stress_matrices("correlated_keys", 5, 8))


@pytest.mark.parametrize("requantize", Requantize)
@pytest.mark.parametrize("scales", ["float", "pow2"])
def test_factors_between_products_too(requantize, scales):
    lower = stress_matrices("half_random", 4, 16)
    program = newton_schulz(16, 5)
    target = TARGETS[requantize]
    plan = qinvert.calibrate(lower, method=program, bits=8, target=target, scales=scales).layer()
    # d M is no operand of M S: its term joins in float32 under every target.
    assert plan.requantize is Requantize.DIVIDE
    check_every_step(plan, stress_matrices("half_random", 3, 16, seed=1))


@pytest.mark.parametrize("factor", [-1.0, 0.5, 1 / 3, -2.7, 1e-30, 1e15])
@pytest.mark.parametrize("scale", [1 / 127, 2.0**-9, 0.3, 1e-9])
def test_factors_too_and_they_saturate(factor, scale):
    step = Rescale(output="scaled", source=MATRIX, factor=float32(factor))
    program = inverse_program(step, chunk=8)
    grids = {MATRIX: 1 / 100, "scaled": scale}
    tensors = {n: Quantization(format=INT8, scale=float32(s)) for n, s in grids.items()}
    plan = LayerPlan(program=program, tensors=tensors, requantize=Requantize.MULTIPLIER)
    check_every_step(plan, stress_matrices("negative_eigenvalues", 5, 8))


def test_a_residual_beyond_float32_enters_the_accumulator_exactly():
    step = MatMul(output="y", left=MATRIX, right=MATRIX, add=(MATRIX,))
    program = inverse_program(step)
    grid = Quantization(format=INT8, scale=float32(1 / 200001))
    coarse = Quantization(format=INT8, scale=0.00018142764747608453)
    plan = LayerPlan(program=program, tensors={"M": grid, "y": coarse}, requantize=Requantize.MULTIPLIER)
    m = torch.zeros(1, 4, 4)
    m[0, 1, 0], m[0, 3, 0], m[0, 3, 1] = 1, 127, -1
    check_every_step(plan, -m * grid.scale)


def test_the_result_is_the_dequantized_output_plus_the_identity():
    plan, lower = calibrated("packed"), stress_matrices("half_random", 3, 16)
    integers = simulate_integers(plan, Systems(lower=lower)).numpy()
    expected = integers * np.float32(plan.output.scale) + np.eye(16, dtype=np.float32)
    assert np.array_equal(simulate_inverse(plan, Systems(lower=lower)), expected)
    assert np.array_equal(np.triu(integers), np.zeros_like(integers))


def test_an_explicit_inverse_gets_no_identity():
    grid = Quantization(format=INT8, scale=2.0**-7)
    program = inverse_program(identity=True)
    plan = LayerPlan(program=program, tensors={"M": grid}, requantize=Requantize.DIVIDE)
    lower = torch.tril(torch.full((4, 4), 0.25), -1)
    assert torch.equal(plan.inverse(lower), -lower)


@pytest.mark.parametrize("name", PROGRAMS)
def test_matrices_of_a_batch_do_not_touch_each_other(name):
    plan = calibrated(name)
    lower = stress_matrices("wide_gates", 7, plan.chunk)
    alone = [plan.inverse(matrix) for matrix in lower]
    assert torch.equal(plan.inverse(lower), torch.stack(alone))


@pytest.mark.parametrize("leading", [(), (1,), (6,), (2, 3), (3, 1, 2)], ids=str)
def test_leading_dimensions_survive(leading):
    plan, lower = calibrated("packed"), stress_matrices("half_random", 6, 16)
    lower = lower[: math.prod(leading)]
    result = plan.inverse(lower.reshape(*leading, 16, 16))
    assert torch.equal(result, plan.inverse(lower).reshape(*leading, 16, 16))


def test_the_layout_in_memory_does_not_matter():
    plan, lower = calibrated("packed"), stress_matrices("half_random", 6, 16)
    expected = plan.inverse(lower)
    assert torch.equal(plan.inverse(lower.mT.contiguous().mT), expected)
    assert torch.equal(plan.inverse(lower.repeat_interleave(2, 0)[::2]), expected)
    assert np.array_equal(plan.inverse(np.asfortranarray(lower.numpy())), expected)
    assert torch.equal(plan.inverse(lower[:1].expand(6, -1, -1)), expected[:1].expand(6, -1, -1))


def test_negative_zeros_are_zeros():
    plan, lower = calibrated("corrected"), stress_matrices("outlier", 4, 8)
    lower[1:] = 0
    signed = torch.where(lower == 0, -0.0, lower)
    assert torch.equal(plan.inverse(signed), plan.inverse(lower))
    assert torch.equal(plan.inverse(signed)[1], torch.eye(8))


def test_values_beyond_the_grid_act_as_its_end():
    plan, lower = calibrated("packed"), stress_matrices("half_random", 4, 16)
    grid = plan.input
    wide = lower.clone()
    wide[0, 9, 3], wide[1, 5, 4] = 1e30, -1e30
    clamped = wide.clamp(-grid.format.maximum * grid.scale, -grid.format.minimum * grid.scale)
    assert torch.equal(plan.inverse(wide), plan.inverse(clamped))
    assert observed(plan, wide)["M"].min() == -128
    assert observed(plan, wide)["M"].max() == 127


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_float_type_is_quantized_from_float32(dtype):
    plan, lower = calibrated("packed"), stress_matrices("half_random", 4, 16).to(dtype)
    assert torch.equal(plan.inverse(lower), plan.inverse(lower.float()))


def test_simulating_changes_neither_input_nor_plan():
    plan, lower = calibrated("packed"), stress_matrices("half_random", 4, 16)
    before = lower.clone()
    first = plan.inverse(lower)
    assert torch.equal(lower, before)
    assert torch.equal(plan.inverse(lower), first)


@pytest.mark.parametrize("shape", [(0, 16, 16), (2, 0, 16, 16)], ids=str)
def test_an_empty_batch_is_refused(shape):
    with pytest.raises(InputError, match="pass square matrices"):
        calibrated("packed").inverse(torch.zeros(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(value):
    lower = stress_matrices("half_random", 4, 16)
    lower[2, 9, 1] = value
    with pytest.raises(InputError, match="L holds 1 NaN or Inf"):
        calibrated("packed").inverse(lower)


def test_autocast_and_reduced_precision_change_no_bit():
    lower = stress_matrices("correlated_keys", 16, 32)
    plan = qinvert.calibrate(lower).layer()
    expected = plan.inverse(lower)
    program = plan.program
    exact = program.run(lower)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(plan.inverse(lower), expected)
    finally:
        torch.set_float32_matmul_precision(precision)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(program.run(lower), exact)
        # The check can fail: autocast does reach a plain product.
        assert (lower @ lower).dtype == torch.bfloat16
