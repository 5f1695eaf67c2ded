from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from inverse_programs import inverse_program

from qinvert.errors import InputError
from qinvert.methods import block_merge, neumann, neumann_doubling
from qinvert.program.ports import MATRIX
from qinvert.program.steps import Add, Axis, Concat, Constant, Mask, MatMul, Rescale, Slice
from qinvert.stress import stress_matrices

BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
PROGRAMS = [
    block_merge(8, 1),
    block_merge(8, 2, corrections=1),
    block_merge(8, 4, layout="masked"),
    neumann(8, 7),
    neumann_doubling(8),
]

every_dtype = pytest.mark.parametrize("dtype", BITS, ids=str)
every_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.title)


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    def nearest(x: float) -> float:
        mantissa, exponent = math.frexp(x)
        return math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)

    return np.vectorize(nearest, otypes=[float])(values)


def observed(program, lower, dtype) -> dict[str, torch.Tensor]:
    seen = {}
    program.run(lower, dtype=dtype, observe=seen.__setitem__)
    return seen


@every_dtype
@every_program
def test_every_tensor_is_stored_in_the_chosen_type(program, dtype):
    seen = observed(program, stress_matrices("half_random", 2, 8), dtype)
    assert tuple(seen) == program.tensors
    assert {tensor.dtype for tensor in seen.values()} == {dtype}


@every_dtype
@every_program
def test_every_step_rounds_once_from_what_the_steps_before_stored(program, dtype):
    # Multiples of 1/16 with few bits: all sums are exact before the one rounding.
    lower = torch.tril(torch.randint(-9, 10, (1, 8, 8), generator=torch.Generator().manual_seed(3)) / 16, -1)
    seen = {name: tensor.double().numpy() for name, tensor in observed(program, lower, dtype).items()}
    bits = BITS[dtype]
    inexact = 0
    for step in program.steps:
        if isinstance(step, MatMul):
            total = seen[step.left] @ seen[step.right]
            total += sum(seen[a] for a in step.add) - sum(seen[s] for s in step.subtract)
        elif isinstance(step, Add):
            total = seen[step.left] + seen[step.right]
        else:
            continue
        if bits <= 11:
            assert np.array_equal(seen[step.output], rounded(total, bits)), step.output
            inexact += int((seen[step.output] != total).sum())
        else:
            assert np.allclose(seen[step.output], total, rtol=2.0 ** (2 - bits), atol=2.0 ** (4 - bits))
    assert bits > 8 or inexact > 0


def test_products_of_half_floats_accumulate_in_float32():
    # 1 + 2048 is no float16; 1 + 2048 - 2048 is 1 only if nothing is rounded on the way.
    m = torch.zeros(4, 4)
    m[1, 0], m[2, 0], m[3] = 1.0, 2048.0, torch.tensor([-2048.0, 1.0, 1.0, 0.0])
    product = MatMul(output="product", left=MATRIX, right=MATRIX, add=(MATRIX,))
    program = inverse_program(product)
    assert float(program.run(-m, dtype=torch.float16)[3, 0]) == 1.0


@every_dtype
@pytest.mark.parametrize("factor", [1.0, -1.0, 0.75, 2.0**-7, 1 + 2.0**-23])
def test_a_factor_multiplies_before_the_one_rounding(dtype, factor):
    step = Rescale(output="scaled", source=MATRIX, factor=factor)
    program = inverse_program(step, chunk=8, identity=True)
    lower = stress_matrices("half_random", 2, 8).to(dtype)
    product = -lower.double().numpy() * factor
    bits = BITS[dtype]
    expected = product if bits == 53 else rounded(rounded(product, 24), bits)
    assert np.array_equal(program.run(lower, dtype=dtype).double().numpy(), expected)


def test_moving_steps_move():
    corner = Constant(name="corner", rows=4, columns=4, ones=((0, 0), (0, 0), (0, 1), (0, 2)))
    zeros = Constant(name="zeros", rows=2, columns=2, ones=((0, 0),) * 2)
    steps = (
        Mask(output="masked", source=MATRIX, constant="corner"),
        Slice(output="block", source="masked", rows=(2, 4), columns=(0, 2)),
        Concat(output="stack", sources=("block", "block"), axis=Axis.BLOCKS),
        Slice(output="second", source="stack", blocks=(1, 2)),
        Concat(output="left", sources=("zeros", "second"), axis=Axis.ROWS),
        Concat(output="right", sources=("zeros", "zeros", "second"), axis=Axis.ROWS),
        Slice(output="right_half", source="right", rows=(0, 4)),
        Concat(output="whole", sources=("left", "right_half"), axis=Axis.COLUMNS),
        Rescale(output="result", source="whole"),
    )
    program = inverse_program(*steps, constants=(corner, zeros))
    lower = torch.stack([torch.tril(k + torch.arange(16.0).reshape(4, 4), -1) for k in (0, 100)])
    expected = torch.zeros(2, 4, 4)
    expected[:, 2, 0] = -lower[:, 2, 0]
    expected[:, 3, :2] = -lower[:, 3, :2]
    assert torch.equal(program.run(lower) - torch.eye(4), expected)
    assert observed(program, lower, torch.float32)["stack"].shape == (4, 2, 2)


def test_a_mask_clears_infinities():
    clear = Constant(name="clear", rows=4, columns=4, ones=((0, 0),) * 4)
    steps = (
        MatMul(output="square", left=MATRIX, right=MATRIX),
        Mask(output="cleared", source="square", constant="clear"),
    )
    program = inverse_program(*steps, constants=(clear,), output="cleared")
    seen = observed(program, 1e4 * torch.tril(torch.ones(4, 4), -1), torch.float16)
    assert torch.isinf(seen["square"]).any()
    assert torch.equal(seen["cleared"], torch.zeros_like(seen["cleared"]))


@every_dtype
def test_arrays_in_give_arrays_out_with_the_values_of_tensors(dtype):
    lower = stress_matrices("half_random", 2, 8)
    from_tensor = PROGRAMS[0].run(lower, dtype=dtype)
    from_array = PROGRAMS[0].run(lower.numpy(), dtype=dtype)
    assert isinstance(from_array, np.ndarray)
    assert from_array.dtype == ("float32" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."))
    assert np.array_equal(from_array, from_tensor.to(torch.float32 if dtype == torch.bfloat16 else dtype))


def test_float32_is_the_default_whatever_comes_in():
    lower = stress_matrices("half_random", 2, 8)
    for given in (lower.double(), lower.half(), lower.bfloat16(), (4 * lower).int()):
        assert PROGRAMS[0].run(given).dtype == torch.float32


@pytest.mark.parametrize("leading", [(), (1,), (6,), (2, 3), (1, 2, 1, 3)])
def test_leading_dimensions_survive_and_matrices_do_not_mix(leading):
    lower = stress_matrices("half_random", 6, 8)[: math.prod(leading)]
    result = PROGRAMS[1].run(lower.reshape(*leading, 8, 8), dtype=torch.float64)
    assert result.shape == (*leading, 8, 8)
    alone = [PROGRAMS[1].run(matrix, dtype=torch.float64) for matrix in lower]
    assert torch.allclose(result.reshape(-1, 8, 8), torch.stack(alone), rtol=0, atol=1e-14)


def test_the_input_is_neither_changed_nor_aliased():
    lower = stress_matrices("half_random", 2, 8)
    before = lower.clone()
    neumann(8, 1).run(lower).fill_(7)
    assert torch.equal(lower, before)


def test_an_explicit_inverse_gets_no_identity():
    program = inverse_program(identity=True)
    lower = stress_matrices("half_random", 1, 4)
    assert torch.equal(program.run(lower), -lower)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool, "float32", np.float32])
def test_other_storage_types_are_refused(dtype):
    with pytest.raises(InputError, match="is not a storage type; use float64, float32, float16 or bfloat16"):
        PROGRAMS[0].run(torch.zeros(8, 8), dtype=dtype)


def test_another_size_is_refused():
    with pytest.raises(InputError, match="L is 16 x 16, but the plan is for 8 x 8"):
        PROGRAMS[0].run(torch.zeros(16, 16))


def test_illegal_matrices_are_refused_before_anything_runs():
    calls = []
    with pytest.raises(InputError, match="not strictly lower triangular"):
        PROGRAMS[0].run(torch.ones(8, 8), observe=lambda *pair: calls.append(pair))
    assert not calls
