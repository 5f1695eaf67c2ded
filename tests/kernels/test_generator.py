"""Generated sources: what they contain, what they depend on, what is refused."""

import ast
from dataclasses import replace

import pytest

import qinvert
from qinvert.calibration.planning.scales import scale_groups
from qinvert.errors import ProgramError
from qinvert.kernels import generator
from qinvert.kernels.float_ops import Precision
from qinvert.kernels.generator import (
    float_kernel,
    float_program,
    hoisted,
    integer_kernel,
    program_kernel,
)
from qinvert.kernels.source import Source
from qinvert.kernels.statements import rendered, variable
from qinvert.kernels.tiles import UnsupportedError
from qinvert.numerics.scales import float32
from qinvert.plan.quantization import Quantization
from qinvert.stress import stress_matrices


@pytest.fixture(scope="module")
def plans():
    lower = stress_matrices("correlated_keys", 32, 64, seed=1)
    program = qinvert.block_merge(64, base=2, tile=16)
    return {
        bits: qinvert.calibrate(lower, bits=bits, method=program, min_sqnr_db=0).layer()
        for bits in (4, 8, "8x2", 16)
    }


def statements(text):
    (function,) = [n for n in ast.parse(text).body if getattr(n, "name", "") == "kernel"]
    return function.body


@pytest.mark.parametrize("bits", [4, 8, "8x2"])
def test_one_load_and_one_store_for_every_tile(plans, bits):
    text = integer_kernel(plans[bits]).text
    body = text[text.index("def kernel") :]
    # Ten tiles on and below the diagonal are read, four of them by a loop in a long kernel, which
    # stores tile by tile.
    assert body.count("load_tile(") == (7 if bits == "8x2" else 10)
    assert body.count("for p in tl.range(0, 4") == (bits == "8x2")
    assert body.count("store_tile(") == (16 if bits == "8x2" else 4)
    assert len(statements(text)) > 100


def test_plans_of_one_structure_share_a_kernel(plans):
    plan = plans["8x2"]
    doubled = {name: Quantization(format=q.format, scale=2 * q.scale) for name, q in plan.tensors.items()}
    first, second = integer_kernel(plan), integer_kernel(replace(plan, tensors=doubled))
    assert first.text == second.text
    assert first.scalars != second.scalars
    assert f"s{len(first.scalars) - 1} = tl.load(scalars + {len(first.scalars) - 1})" in first.text

    assert integer_kernel(plans[8]).text != first.text


@pytest.mark.parametrize("options", [{}, {"side": "right"}, {"tile": 16}, {"restart": 4}, {"corrections": 1}])
def test_elimination_has_a_kernel(options):
    lower = stress_matrices("correlated_keys", 8, 64, seed=1)
    program = qinvert.elimination(64, **options)
    for bits in (8, "8x2"):
        plan = qinvert.calibrate(lower, bits=bits, method=program, min_sqnr_db=0).layer()
        text = integer_kernel(plan).text
        assert "load_tile(" in text
        ast.parse(text)


def test_many_scalars_are_arguments(plans):
    plan = plans["8x2"]
    groups = scale_groups(plan.program)
    order = sorted(set(groups.values()))
    grids = {
        name: Quantization(format=q.format, scale=float32(q.scale * (1 + order.index(groups[name]))))
        for name, q in plan.tensors.items()
    }
    generated = integer_kernel(replace(plan, tensors=grids))
    assert generated.loaded is False
    assert f"s{len(generated.scalars) - 1}, " in generated.text
    assert "tl.load(scalars" not in generated.text


def test_counting_covers_every_tensor(plans):
    counting = integer_kernel(plans[8], count=True)
    assert counting.counted == plans[8].program.tensors
    assert counting.text.count("count_values(counters") == len(counting.counted)
    assert integer_kernel(plans[8]).counted == ()


def test_plans_without_exact_products_say_why(plans):
    with pytest.raises(UnsupportedError, match="int16 of tensor 'M'"):
        integer_kernel(plans[16])
    tiny = {name: replace(q, scale=2.0**-40) for name, q in plans["8x2"].tensors.items()}
    with pytest.raises(UnsupportedError, match=r"scale of tensor 'M' is outside"):
        integer_kernel(replace(plans["8x2"], tensors=tiny))
    lower = stress_matrices("correlated_keys", 2, 128, seed=1)
    masked = qinvert.block_merge(128, base=4, layout="masked", corrections=4)
    wide = qinvert.calibrate(lower, method=masked, bits="8x2", min_sqnr_db=0).layer()
    with pytest.raises(UnsupportedError, match="products of tiles"):
        integer_kernel(wide)


@pytest.mark.parametrize("chunk", [16, 32, 64, 128])
@pytest.mark.parametrize("precision", list(Precision))
def test_float_kernels_exist_for_every_chunk(chunk, precision):
    generated = float_kernel(chunk, precision, exact=False)
    assert generated.fused
    assert generated.scalars == ()
    assert statements(generated.text)


@pytest.mark.parametrize("chunk", [16, 32, 64, 128])
@pytest.mark.parametrize("precision", list(Precision))
def test_kernels_that_compute_for_long_run_the_program_of_fewest_products(chunk, precision):
    program = float_program(chunk, precision)
    products = {
        name: program_kernel(found, precision, exact=False).text.count("tl.dot(")
        for name, found in (
            ("block_merge", qinvert.block_merge(chunk, base=1, tile=16)),
            ("elimination", qinvert.elimination(chunk, tile=16)),
        )
    }
    assert products["elimination"] < products["block_merge"]
    waits = chunk >= 64 and precision in (Precision.FP16, Precision.BF16)
    assert program.name == ("block_merge" if waits else "elimination")
    text = float_kernel(chunk, precision, exact=False).text
    assert text.count("tl.dot(") == products[program.name]


def test_the_diagonal_of_a_long_int8_kernel_is_one_loop():
    lower = stress_matrices("correlated_keys", 2, 128, seed=1)
    for program in (qinvert.block_merge(128, base=2, tile=16), qinvert.elimination(128, tile=16)):
        plan = qinvert.calibrate(lower, bits=8, method=program, min_sqnr_db=0).layer()
        body = integer_kernel(plan).text.partition("def kernel")[2]
        # 28 tiles beside the diagonal, and one in the loop.
        assert body.count("load_tile(") == 29
        assert body.count("for p in tl.range(0, 8") == 1


@pytest.mark.parametrize("requantize", ["npu-qdq-int8", "int-ops"])
@pytest.mark.parametrize(("scales", "fused"), [("float", False), ("pow2", True)])
def test_products_join_sums_unrounded_only_under_powers_of_two(scales, fused, requantize):
    lower = stress_matrices("correlated_keys", 4, 32, seed=1)
    program = qinvert.block_merge(32, base=2)
    plan = qinvert.calibrate(lower, method=program, bits=8, target=requantize, scales=scales).layer()
    assert integer_kernel(plan).fused is fused


def test_inputs_that_lose_nothing_need_no_float32_copy():
    def additions(exact):
        return float_kernel(64, Precision.FP16, exact).text.count(" + v")

    assert additions(True) < additions(False)


def test_interpreters_divide(plans):
    plan = plans[8]
    fused, interpreted = integer_kernel(plan).text, integer_kernel(plan, interpreted=True).text
    body = fused[fused.index("def kernel") :]
    assert "divide_slowly(" not in body
    assert body.count("divide_") == body.count("divide_1(") > 10
    assert interpreted == fused.replace(body, body.replace("divide_1(", "divide_slowly("))


def test_as_many_products_as_the_matrix_unit_does(plans, monkeypatch):
    text = integer_kernel(plans[8]).text
    monkeypatch.setattr(generator, "MAX_PRODUCTS", text.count("tl.dot("))
    assert integer_kernel(plans[8]).text == text
    monkeypatch.setattr(generator, "MAX_PRODUCTS", text.count("tl.dot(") - 1)
    with pytest.raises(UnsupportedError, match=f"takes {text.count('tl.dot(')} products of tiles"):
        integer_kernel(plans[8])


def test_stores_move_behind_the_last_value_they_need():
    source = Source()
    first = source.assign("1")
    second = source.assign("{} + 1", first)
    source.assign("{} + 1", second)
    body = list(source.statements)
    twice = source.assign("{} * 2", second)
    for value in (twice, first, 0):
        source.call("store({})", value)
    tail = source.statements[len(body) :]
    assert rendered(hoisted(body, tail)) == [
        "store(0)", "v0 = 1", "store(v0)", "v1 = v0 + 1", "v3 = v1 * 2", "store(v3)", "v2 = v1 + 1"
    ]  # fmt: skip


def test_stores_of_what_is_not_defined_are_refused():
    source = Source()
    source.assign("1")
    body = list(source.statements)
    source.call("store({})", variable("v7"))
    with pytest.raises(ProgramError, match=r"store\(v7\)"):
        rendered(hoisted(body, source.statements[len(body) :]))
