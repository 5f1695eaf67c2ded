"""What the vela program reads from a graph, without the toolkit; what it writes and compiles, with it."""

import importlib.util
import sys
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import qinvert
from qinvert.errors import ExportError
from qinvert.export.runtimes import estimate, execute, installed
from qinvert.export.runtimes.subprocesses import PROGRAMS
from qinvert.stress import STRESS, stress_matrices

METHODS = {
    "packed": lambda chunk: qinvert.block_merge(chunk, base=4),
    "tiled": lambda chunk: qinvert.block_merge(chunk, base=1, tile=8),
    "corrected": lambda chunk: qinvert.block_merge(chunk, base=4, corrections=1),
    "eliminated": qinvert.elimination,
}


@pytest.fixture(scope="module")
def needs_vela():
    if "vela" not in installed():
        pytest.skip("pip install ethos-u-vela ai-edge-litert onnx, or set QINVERT_VELA_PYTHON")


@pytest.fixture
def load(monkeypatch):
    """Return a function that loads a program's module by its name."""

    def loaded(name):
        spec = importlib.util.spec_from_file_location(name, PROGRAMS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return loaded


@pytest.fixture
def reader(load):
    return load("quantized_graph")


def exported(folder, method="packed", scales="pow2", target="npu-qdq-int8", **options):
    lower = torch.cat([stress_matrices(name, 2, 16, seed=7) for name in STRESS])
    plan = qinvert.calibrate(lower, method=METHODS[method](16), target=target, bits=8, scales=scales)
    qinvert.export(plan, folder / "t.onnx", batch=len(lower), chains=1, **options)
    return onnx.load(folder / "t.onnx"), plan.layer(), lower


def returned(model, feed):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)[0]


OPERATORS = {
    "MatMul": np.matmul,
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "QuantizeLinear": lambda x: x,
}


def computed(graph, integers):
    """The integer part in float64, rounded as ONNX rounds."""
    values = dict(integers)
    for operator in graph.operators:
        operands = [
            tensor.values if tensor.values is not None else values[tensor.name] for tensor in operator.inputs
        ]
        output, given = operator.output, operator.attributes
        if operator.kind in OPERATORS:
            reals = [
                tensor.scale * (x.astype(np.float64) - tensor.zero_point)
                for tensor, x in zip(operator.inputs, operands, strict=True)
            ]
            limits = np.iinfo(output.element)
            result = np.rint(OPERATORS[operator.kind](*reals) / output.scale) + output.zero_point
            result = result.clip(limits.min, limits.max).astype(output.element)
        elif operator.kind == "Concat":
            result = np.concatenate(operands, axis=given["axis"])
        elif operator.kind == "Slice":
            part = [slice(None)] * 4
            for axis, start, end in zip(given["axes"], given["starts"], given["ends"], strict=True):
                part[axis] = slice(start, end)
            result = operands[0][tuple(part)]
        else:
            raise AssertionError(operator.kind)
        assert result.shape == output.shape
        values[output.name] = result
    return {tensor.name: values[tensor.name] for tensor in graph.outputs}


@pytest.mark.parametrize("options", [{}, {"output": "integers"}], ids=["T", "integers"])
@pytest.mark.parametrize("target", ["npu-qdq-int8", "npu-qdq-uint8", "ryzen-xint8"])
@pytest.mark.parametrize("method", METHODS)
def test_the_three_parts_are_the_graph(method, target, options, reader, tmp_path):
    model, _, lower = exported(tmp_path, method, target=target, **options)
    feed = {"L": lower[None].to(torch.float32).numpy()}
    graph = reader.read(model)
    for each in (graph, reader.stored_once(graph)):
        (found,) = each.returned(feed, computed(each, each.quantized(feed)))
        assert np.array_equal(found, returned(model, feed))
    assert {tensor.element for operator in graph.operators for tensor in operator.inputs} == {"int8"}
    assert graph.float_products() == []


def test_constants_are_stored_once_where_all_matrices_have_the_same(reader, tmp_path):
    model, _, lower = exported(tmp_path, "eliminated")
    graph = reader.read(model)

    def widths(graph):
        constants = [t for o in graph.operators if o.kind == "Add" for t in o.inputs if t.values is not None]
        return {tensor.shape[1] for tensor in constants}

    assert widths(graph) == {len(lower)}
    assert widths(reader.stored_once(graph)) == {1}


def test_products_of_floats_are_named(reader, tmp_path):
    model, _, _ = exported(tmp_path, input="keys", key_size=8)
    assert reader.read(model).float_products() == ["keys/products", "decay/sums"]


# Graphs written by hand.


class Graph:
    """Collects the nodes of a QDQ graph with one float32 input."""

    def __init__(self, shape=(1, 2, 4, 4)):
        self.shape, self.nodes, self.constants = shape, [], []
        self.parts = {}

    def constant(self, array, name):
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, operator, inputs, **attributes):
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def grid(self, scale, element, zero):
        name = f"{len(self.nodes)}"
        scale = self.constant(np.float32(scale), f"scale_{name}")
        return [scale, self.constant(np.dtype(element).type(zero), f"zero_{name}")]

    def quantized(self, value, scale, element="int8", zero=0):
        grid = self.grid(scale, element, zero)
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [value, *grid]), *grid])

    def stored(self, integers, scale):
        name = self.constant(integers, f"integers_{len(self.nodes)}")
        return self.node("DequantizeLinear", [name, *self.grid(scale, integers.dtype, 0)])

    def returns(self, name, value, scale):
        """Add a part to the output."""
        flat = self.node("Reshape", [value, self.constant(np.int64([1, -1]), f"flat_{len(self.nodes)}")])
        self.parts[name] = (flat, scale)

    def model(self):
        flat = [part for part, _ in self.parts.values()]
        self.nodes.append(helper.make_node("Concat", flat, ["result"], name="result", axis=1))
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info("result", TensorProto.FLOAT, None)],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model, data_prop=True)


def every_operator():
    """Each operator that the writer knows, on int8, and products and sums on other types."""
    graph, rng = Graph(), np.random.default_rng(0)
    x, y, z = (graph.quantized("x", scale) for scale in (1 / 32, 1 / 29, 1 / 87))
    wide = graph.quantized("x", 1 / 9000, "int16")
    shifted = graph.quantized("x", 1 / 32, "uint8", 128)
    mask = graph.stored(rng.integers(0, 2, (1, 1, 4, 4), dtype=np.int8), 1.0)
    eye = graph.stored(32 * np.broadcast_to(np.eye(4, dtype=np.int8), (1, 2, 4, 4)), 1 / 32)

    def index(*values):
        return graph.constant(np.int64(values), f"index_{len(graph.constants)}")

    def end(value):
        return graph.constant(np.float32(value), f"end_{len(graph.constants)}")

    for name, value, scale, *grid in (
        ("MatMul", graph.node("MatMul", [x, y]), 1 / 11),
        ("Add", graph.node("Add", [y, z]), 1 / 40),
        ("Sub", graph.node("Sub", [y, z]), 1 / 40),
        ("Mul", graph.node("Mul", [y, z]), 1 / 40),
        ("mask", graph.node("Mul", [x, mask]), 1 / 32),
        ("Slice", graph.node("Slice", [x, index(1, -3), index(9, 4), index(1, 3)]), 1 / 32),
        ("Concat", graph.node("Concat", [x, eye, x], axis=2), 1 / 32),
        ("Transpose", graph.node("Transpose", [x], perm=[0, 1, 3, 2]), 1 / 32),
        ("Reshape", graph.node("Reshape", [x, index(1, 8, 2, 2)]), 1 / 32),
        ("Clip", graph.node("Clip", [x, end(-7.25 / 32), end(7.25 / 32)]), 1 / 32),
        ("requantize", x, 1 / 29),
        ("uint8", graph.node("MatMul", [shifted, shifted]), 1 / 11, "uint8", 128),
        ("int16 by int8", graph.node("MatMul", [wide, y]), 1 / 3000, "int16"),
        ("int16", graph.node("Sub", [wide, wide]), 1 / 3000, "int16"),
    ):
        graph.returns(name, graph.quantized(value, scale, *grid), scale)
    return graph


#: Operators that round; the others move integers, or change them exactly.
ROUNDS = {"MatMul", "Add", "Sub", "Mul", "requantize", "uint8", "int16 by int8"}


def test_every_operator_is_that_of_onnx(needs_vela):
    graph = every_operator()
    model, rng = graph.model(), np.random.default_rng(1)
    feeds = [{"x": rng.uniform(-4, 4, graph.shape).astype(np.float32)} for _ in range(8)]
    expected = np.concatenate([returned(model, feed) for feed in feeds])
    for execution in execute("vela", model.SerializeToString(), feeds):
        found, start = np.concatenate(execution.outputs), 0
        for name, (flat, scale) in graph.parts.items():
            width = returned_width(model, flat)
            steps = np.abs(found - expected)[:, start : start + width] / np.float32(scale)
            assert steps.max() < (1.01 if name in ROUNDS else 0.01), name
            start += width
        assert start == found.shape[1]
        assert set(execution.products.values()) == {"int8 x int8", "int16 x int16"}
        # An Ethos-U55 does not multiply int16.
        assert bool(execution.elsewhere) is (execution.setting == "ethos-u55-128")


def returned_width(model, name):
    (found,) = [value for value in model.graph.value_info if value.name == name]
    return found.type.tensor_type.shape.dim[1].dim_value


def test_two_grids_of_one_constant_stay_two(reader):
    graph = Graph()
    integers = graph.constant(np.ones((1, 1, 1, 1), np.int8), "ones")
    ones = [graph.node("DequantizeLinear", [integers, *graph.grid(s, "int8", 0)]) for s in (0.5, 2)]
    scaled = graph.node("Mul", [graph.quantized("x", 1 / 32), ones[0]])
    scaled = graph.node("Mul", [graph.quantized(scaled, 1 / 32), ones[1]])
    graph.returns("T", graph.quantized(scaled, 1 / 32), 1 / 32)
    model, feed = graph.model(), {"x": np.full((1, 2, 4, 4), 2, np.float32)}
    found = reader.read(model)
    constants = {t.name: t.scale for o in found.operators for t in o.inputs if t.values is not None}
    assert sorted(constants.values()) == [0.5, 2]
    results = computed(found, found.quantized(feed))
    assert np.array_equal(found.returned(feed, results)[0], returned(model, feed))


def test_a_graph_without_operators_on_integers_runs(needs_vela):
    graph = Graph()
    graph.returns("x", graph.quantized("x", 0.5), 0.5)
    feed = {"x": np.linspace(-100, 100, 32, dtype=np.float32).reshape(1, 2, 4, 4)}
    model = graph.model()
    for execution in execute("vela", model.SerializeToString(), [feed]):
        assert np.array_equal(execution.outputs[0], returned(model, feed))
    with pytest.raises(ExportError, match=r"no operators on integers: nothing of it runs on ethos-u85-256"):
        estimate(model.SerializeToString(), "ethos-u85-256")


def test_a_graph_that_takes_integers_is_read(reader):
    graph = Graph()
    graph.returns("x", graph.node("DequantizeLinear", ["x", *graph.grid(0.5, "int8", 0)]), 0.5)
    model = graph.model()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT8
    found = reader.read(model)
    assert [(tensor.name, tensor.scale) for tensor in found.inputs] == [("x", 0.5)]
    feed = {"x": np.arange(32, dtype=np.int8).reshape(1, 2, 4, 4)}
    integers = found.quantized(feed)
    assert np.array_equal(integers["x"], feed["x"])
    assert np.array_equal(found.returned(feed, integers)[0], returned(model, feed))


def unquantized():
    graph = Graph()
    x = graph.quantized("x", 1 / 32)
    total = graph.node("Add", [graph.node("MatMul", [x, x]), x])
    graph.returns("T", graph.quantized(total, 1 / 32), 1 / 32)
    return graph


def moved_to_another_grid():
    graph = Graph()
    turned = graph.node("Transpose", [graph.quantized("x", 1 / 32)], perm=[0, 1, 3, 2])
    graph.returns("T", graph.quantized(turned, 1 / 16), 1 / 16)
    return graph


def read_on_two_grids():
    graph = Graph()
    x = graph.node("QuantizeLinear", ["x", *graph.grid(1 / 32, "int8", 0)])
    operands = [graph.node("DequantizeLinear", [x, *graph.grid(s, "int8", 0)]) for s in (1 / 32, 1 / 16)]
    graph.returns("T", graph.quantized(graph.node("MatMul", operands), 1 / 8), 1 / 8)
    return graph


def a_scale_for_each_column():
    graph = Graph()
    grid = [graph.constant(np.full(4, 0.1, np.float32), "s"), graph.constant(np.zeros(4, np.int8), "z")]
    graph.returns("T", graph.node("DequantizeLinear", [graph.node("QuantizeLinear", ["x", *grid]), *grid]), 1)
    return graph


def of_any_batch():
    graph = Graph((1, None, 4, 4))
    graph.returns("T", graph.quantized("x", 1 / 32), 1 / 32)
    return graph


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (unquantized, r"Add .* reads 'MatMul_\d', which is not quantized, .* requantize='multiplier'"),
        (moved_to_another_grid, r"Transpose .* moves integers from one grid to another"),
        (read_on_two_grids, r"the integers .* are read on another grid than they were written on"),
        (a_scale_for_each_column, r"has 4 scales and the type int8; export with one scale for each"),
        (of_any_batch, r"has no static shape; export with a batch"),
    ],
)
def test_what_has_no_integers_is_refused(made, said, reader):
    with pytest.raises(SystemExit, match=said):
        reader.read(made().model())


def unknown_operator():
    graph = Graph()
    graph.returns("T", graph.quantized(graph.node("Relu", [graph.quantized("x", 1)]), 1), 1)
    return graph


def every_second_column():
    graph = Graph()
    index = [graph.constant(np.int64([value]), f"i{value}") for value in (0, 4, 3, 2)]
    graph.returns("T", graph.quantized(graph.node("Slice", [graph.quantized("x", 1), *index]), 1), 1)
    return graph


def a_sum_much_finer_than_its_terms():
    graph = Graph()
    total = graph.node("Add", [graph.quantized("x", 1), graph.quantized("x", 2)])
    graph.returns("T", graph.quantized(total, 2.0**-18), 1)
    return graph


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (unknown_operator, r"no TFLite operator is known for Relu .*; known are Add, Clip, Concat"),
        (every_second_column, r"Slice .* leaves elements out; only steps of 1 are written"),
        (a_sum_much_finer_than_its_terms, r"Add .* TFLite takes less than 524288 times as much"),
    ],
)
def test_what_cannot_be_written_is_refused(made, said, needs_vela):
    feed = {"x": np.zeros((1, 2, 4, 4), np.float32)}
    with pytest.raises(ExportError, match=said):
        list(execute("vela", made().model().SerializeToString(), [feed]))


# Cycles.

SUMMARY = """cycles_npu,cycles_sram_access,cycles_dram_access,cycles_on_chip_flash_access,\
cycles_off_chip_flash_access,cycles_total,sram_total_bytes,dram_total_bytes,on_chip_flash_total_bytes,\
off_chip_flash_total_bytes
302173,39040,798067,0,0,966944,1081344,2326528,0,0
"""


def test_the_summary_is_read_by_its_columns(load, monkeypatch, tmp_path):
    for name, names in {
        "ethosu": [],
        "ethosu.vela": ["vela"],
        "ai_edge_litert": ["schema_py_generated"],
        "ai_edge_litert.interpreter": ["Interpreter", "OpResolverType"],
        "tflite_writer": ["operand_element", "write"],
    }.items():
        fake = ModuleType(name)
        vars(fake).update(dict.fromkeys(names))
        monkeypatch.setitem(sys.modules, name, fake)
    load("quantized_graph")
    load("protocol")
    program = load("vela_program")
    monkeypatch.setattr(program, "version", lambda package: {"ethos-u-vela": "5.2.0"}[package])
    system = program.CHIPS["ethos-u85-256"].system
    (tmp_path / f"ethos-u85-256_summary_{system}.csv").write_text(SUMMARY)
    found = program.cost("ethos-u85-256", tmp_path)
    assert found["cycles"] == 966944
    assert found["parts"] == {"NPU": 302173, "SRAM": 39040, "DRAM": 798067}
    assert found["traffic"] == {"SRAM": 1081344, "DRAM": 2326528}
    assert found["source"].startswith("estimated by Arm's Vela compiler 5.2.0 for ethos-u85-256 (")
    assert found["source"].endswith("not measured; compare within one configuration only")


def test_cycles_grow_with_the_batch_and_the_compiled_file_is_kept(needs_vela, tmp_path):
    for chip in ("ethos-u85-256", "ethos-u55-128"):
        cycles = []
        for batch in (8, 32):
            lower = stress_matrices("correlated_keys", 8, 16)
            plan = qinvert.calibrate(lower, method=METHODS["packed"](16), target="npu-qdq-int8")
            qinvert.export(plan, tmp_path / "t.onnx", batch=batch)
            found = estimate((tmp_path / "t.onnx").read_bytes(), chip, keep=tmp_path / "kept")
            cycles.append(found.cycles)
            assert found.parts["NPU"] <= found.cycles
            assert found.elsewhere == ()
        assert cycles[0] < cycles[1]
        assert (tmp_path / "kept" / f"{chip}_vela.tflite").read_bytes()[4:8] == b"TFL3"


def test_products_that_an_npu_leaves_to_the_cpu_have_no_cost(needs_vela, tmp_path):
    lower = stress_matrices("correlated_keys", 8, 16)
    plan = qinvert.calibrate(lower, method=METHODS["packed"](16), bits=16, target="npu-qdq-int16")
    qinvert.export(plan, tmp_path / "t.onnx", batch=8)
    content = (tmp_path / "t.onnx").read_bytes()
    assert set(estimate(content, "ethos-u85-256").products.values()) == {"int16 x int16"}
    with pytest.raises(ExportError, match=r"12 operators of this graph have no cost there"):
        estimate(content, "ethos-u55-128")
