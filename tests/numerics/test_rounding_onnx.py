from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from qinvert.formats import INT8, INT16, UINT8
from qinvert.numerics import rounding
from qinvert.numerics.exact import integer_matmul
from qinvert.numerics.scales import float32, multiplier, product_scale

TYPES = {INT8: TensorProto.INT8, UINT8: TensorProto.UINT8, INT16: TensorProto.INT16}
SCALES = [float(np.float32(s)) for s in (1.0, 2.0**-7, 1 / 127, 1 / 113, 0.3, 1e-20, 1e10)]

every_scale = pytest.mark.parametrize("scale", SCALES, ids="{:.3g}".format)
every_format = pytest.mark.parametrize("fmt", TYPES, ids=str)


@cache
def session(nodes: tuple, inputs: tuple, output: int) -> onnxruntime.InferenceSession:
    graph = helper.make_graph(
        [helper.make_node(op, reads, [writes], **dict(more)) for op, reads, writes, more in nodes],
        "one_operator",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs],
        [helper.make_tensor_value_info("y", output, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def run(nodes, inputs, output, **values):
    arrays = {name: np.asarray(value) for name, value in values.items()}
    (result,) = session(tuple(nodes), tuple(inputs), output).run(["y"], arrays)
    return torch.from_numpy(result.astype(np.float64))


def node(op, *inputs, output="y", **attributes):
    return op, inputs, output, tuple(attributes.items())


def zero(fmt):
    return np.array(fmt.zero_point, dtype=helper.tensor_dtype_to_np_dtype(TYPES[fmt]))


def random_integers(fmt, *shape, seed=0):
    info = np.iinfo(zero(fmt).dtype)
    return np.random.default_rng(seed).integers(info.min, info.max + 1, shape, dtype=zero(fmt).dtype)


def as_float(array):
    return torch.from_numpy(array.astype(np.float32))


def tricky_values(fmt, scale):
    # Grid points, half steps and their float32 neighbours, far values, infinities, zeros.
    halves = np.arange(2 * fmt.minimum - 9, 2 * fmt.maximum + 9) / 2 - fmt.zero_point
    halves = (halves * scale).astype(np.float32)
    around = [np.nextafter(halves, np.float32(end)) for end in (-np.inf, np.inf)]
    special = np.array([np.inf, -np.inf, 3e38, -3e38, 0.0, -0.0, 1e-45], dtype=np.float32)
    spread = np.random.default_rng(1).normal(0, 60 * scale, 4000).astype(np.float32)
    return np.concatenate([halves, *around, special, spread])


@every_format
@every_scale
def test_quantize_is_quantizelinear(fmt, scale):
    x = tricky_values(fmt, scale)
    inputs = [("x", TensorProto.FLOAT), ("s", TensorProto.FLOAT), ("z", TYPES[fmt])]
    expected = run(
        [node("QuantizeLinear", "x", "s", "z")], inputs, TYPES[fmt], x=x, s=np.float32(scale), z=zero(fmt)
    )
    assert torch.equal(rounding.quantize(torch.from_numpy(x), scale, fmt).double(), expected)


@every_format
@every_scale
def test_dequantize_is_dequantizelinear(fmt, scale):
    q = random_integers(fmt, 5000)
    inputs = [("q", TYPES[fmt]), ("s", TensorProto.FLOAT), ("z", TYPES[fmt])]
    expected = run(
        [node("DequantizeLinear", "q", "s", "z")],
        inputs,
        TensorProto.FLOAT,
        q=q,
        s=np.float32(scale),
        z=zero(fmt),
    )
    assert torch.equal(rounding.dequantize(as_float(q), scale, fmt).double(), expected)


def scalar_inputs(names, values):
    inputs = [(n, TensorProto.INT8 if n.startswith("z") else TensorProto.FLOAT) for n in names]
    return inputs, {n: np.int8(0) if n.startswith("z") else np.float32(values[n]) for n in names}


@pytest.mark.parametrize("k", [1, 8, 64, 200])
@pytest.mark.parametrize("spread", [97.3, 512.0, 2048.0])
def test_the_multiplier_form_is_qlinearmatmul(k, spread):
    left, right = random_integers(INT8, 2, 40, k, seed=k), random_integers(INT8, 2, k, 30, seed=k + 1)
    scales = {"sa": float(np.float32(1 / 127)), "sb": float(np.float32(0.0123))}
    unit = product_scale(scales["sa"], scales["sb"])
    scales["sy"] = float32(unit * spread * k**0.5)
    names = ("a", "sa", "za", "b", "sb", "zb", "sy", "zy")
    inputs, values = scalar_inputs([n for n in names if n not in "ab"], scales)
    inputs += [("a", TensorProto.INT8), ("b", TensorProto.INT8)]
    expected = run([node("QLinearMatMul", *names)], inputs, TensorProto.INT8, a=left, b=right, **values)
    accumulator = integer_matmul(as_float(left), as_float(right), k * 128**2)
    factor = multiplier(scales["sa"], scales["sb"], scales["sy"])
    assert torch.equal(rounding.requantize_multiplier(accumulator, factor, INT8).double(), expected)
    assert len(expected.unique()) > 10


@pytest.mark.parametrize("k", [1, 7, 64, 1024])
def test_integer_matmul_is_matmulinteger(k):
    left, right = random_integers(INT8, 3, 17, k, seed=k), random_integers(INT8, 3, k, 9, seed=k + 1)
    inputs = [("a", TensorProto.INT8), ("b", TensorProto.INT8)]
    expected = run([node("MatMulInteger", "a", "b")], inputs, TensorProto.INT32, a=left, b=right)
    exact = integer_matmul(as_float(left), as_float(right), k * 128**2)
    assert torch.equal(exact.double(), expected)


@pytest.mark.parametrize("output_scale", SCALES[1:5], ids="{:.3g}".format)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_divide_form_is_cast_mul_add_quantizelinear(output_scale, sign):
    generator = np.random.default_rng(3)
    acc = generator.integers(-(2**20), 2**20, 20_000, dtype=np.int32)
    first, second = random_integers(INT8, 20_000, seed=4), random_integers(INT8, 20_000, seed=5)
    scales = {"unit": 3.1e-6, "s1": 1 / 127, "s2": 1 / 89, "sy": output_scale}
    scales = {name: float(np.float32(value)) for name, value in scales.items()}
    nodes = [
        node("Cast", "acc", output="f", to=TensorProto.FLOAT),
        node("Mul", "f", "unit", output="x"),
        node("DequantizeLinear", "first", "s1", output="d1"),
        node("Add", "x", "d1", output="x1"),
        node("DequantizeLinear", "second", "s2", output="d2"),
        node("Add" if sign > 0 else "Sub", "x1", "d2", output="x2"),
        node("QuantizeLinear", "x2", "sy", "zy"),
    ]
    inputs, values = scalar_inputs((*scales, "zy"), scales)
    inputs += [("acc", TensorProto.INT32), ("first", TensorProto.INT8), ("second", TensorProto.INT8)]
    expected = run(nodes, inputs, TensorProto.INT8, acc=acc, first=first, second=second, **values)
    addends = [(as_float(first), scales["s1"]), (as_float(second), sign * scales["s2"])]
    q = rounding.requantize_divide(torch.from_numpy(acc), scales["unit"], addends, output_scale, INT8)
    assert torch.equal(q.double(), expected)


@pytest.mark.parametrize("factor", [-1.0, 0.5, 1 / 3, 1.9999, 2.0**-20, -1e8])
@pytest.mark.parametrize("output_scale", SCALES[1:5], ids="{:.3g}".format)
def test_the_scaled_form_is_cast_mul_mul_quantizelinear(factor, output_scale):
    q = random_integers(INT8, 4000, seed=6)
    scales = {"unit": 1 / 113, "factor": factor, "sy": output_scale}
    scales = {name: float(np.float32(value)) for name, value in scales.items()}
    nodes = [
        node("Cast", "q", output="f", to=TensorProto.FLOAT),
        node("Mul", "f", "unit", output="x"),
        node("Mul", "x", "factor", output="x1"),
        node("QuantizeLinear", "x1", "sy", "zy"),
    ]
    inputs, values = scalar_inputs((*scales, "zy"), scales)
    expected = run(nodes, [*inputs, ("q", TensorProto.INT8)], TensorProto.INT8, q=q, **values)
    actual = rounding.requantize_scaled(as_float(q), scales["unit"], scales["factor"], scales["sy"], INT8)
    assert torch.equal(actual.double(), expected)
