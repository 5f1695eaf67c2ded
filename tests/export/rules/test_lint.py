from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import qinvert
from qinvert.errors import ExportError
from qinvert.export import exporting
from qinvert.export.exporting import build
from qinvert.export.graph import GraphBuilder
from qinvert.export.rules.lint import lint
from qinvert.export.rules.rules import RULES
from qinvert.formats import INT8
from qinvert.numerics.accumulators import INT32_LIMIT
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.profiles import PROFILES
from qinvert.stress import from_keys, stress_matrices, unit_keys

LOWER = stress_matrices("correlated_keys", 4, 32)
METHODS = {
    "auto": "auto",
    "packed": qinvert.block_merge(32, base=4),
    "masked": qinvert.block_merge(32, base=2, layout="masked"),
    "tiled": qinvert.block_merge(32, base=1, tile=16),
    "corrected": qinvert.block_merge(32, base=4, corrections=1),
    "banded_residual": "banded_residual",
    "neumann": qinvert.neumann(32, 3),
    "newton_schulz": "newton_schulz",
    "forward_substitution": "forward_substitution",
}


def planned(target="npu-qdq-int8", method="corrected", **options):
    return qinvert.calibrate(LOWER, method=METHODS[method], target=target, min_sqnr_db=0, **options)


def broken(model, profile=None):
    """Names of the rules that a model breaks."""
    return {finding.rule for finding in qinvert.export.lint(model, profile)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("profile", PROFILES)
def test_what_is_exported_is_clean(profile, method, tmp_path):
    # Read from the file, for both inputs.
    if method == "newton_schulz" and PROFILES[profile].power_of_two_scales:
        pytest.skip("its factors are no powers of two")
    plan = planned(profile, method)
    for source in ("L", "M"):
        qinvert.export(plan, tmp_path / "t.onnx", batch=3, input=source)
        assert qinvert.export.lint(tmp_path / "t.onnx") == []


@pytest.mark.parametrize("profile", ["int-ops", "int-ops-x86", "qlinear", "qlinear-uint8", "npu-qdq-uint8"])
def test_plans_of_another_target_are_clean_too(profile):
    assert broken(build(planned("npu-qdq-int8"), profile=profile)) == set()


@pytest.mark.parametrize("profile", ["int-ops", "int-ops-x86"])
@pytest.mark.parametrize("method", ["corrected", "masked"])
def test_two_planes_are_clean(profile, method):
    assert broken(build(planned(profile, method, bits="8x2"))) == set()


@pytest.mark.parametrize("bits", ["auto", 16])
def test_planes_of_joined_int16_operands_are_clean(bits):
    # What was joined as int16 is int8 in the product.
    assert broken(build(planned("npu-qdq-int16", "corrected", bits=bits))) == set()


def test_large_chunks_are_clean():
    lower = stress_matrices("independent_keys", 1, 512)
    plan = qinvert.calibrate(lower, method=qinvert.block_merge(512, base=16, corrections=1), min_sqnr_db=0)
    assert broken(build(plan, batch=1)) == set()


class Sketch:
    """A graph of quantized tensors, written by hand."""

    def __init__(self, element="int8", zero=0):
        self.graph = GraphBuilder()
        self.element = element
        self.zero = self.graph.initializer("zero", np.array(zero, dtype=element))

    def input(self, name, *shape):
        self.shape = [1, *shape]
        return self.quantized(self.graph.input(name, self.shape), self.shape)

    def scale(self, value):
        return self.graph.scalar(f"scale/{value!r}", value)

    def quantized(self, name, shape, scale=2.0**-6):
        inputs = [self.scale(scale), self.zero]
        stored = self.graph.node("QuantizeLinear", [name, *inputs], f"{name}/q", shape, self.element)
        return self.graph.node("DequantizeLinear", [stored, *inputs], f"{name}/dq", shape)

    def operator(self, operator, inputs, name, shape, scale=2.0**-6, **attributes):
        return self.quantized(self.graph.node(operator, inputs, name, shape, **attributes), shape, scale)

    def cut(self, source, rows, columns, name):
        starts = self.graph.initializer(f"{name}/starts", np.array([rows[0], columns[0]]))
        ends = self.graph.initializer(f"{name}/ends", np.array([rows[1], columns[1]]))
        axes = self.graph.initializer("axes", np.array([2, 3]))
        shape = [1, self.shape[1], rows[1] - rows[0], columns[1] - columns[0]]
        return self.operator("Slice", [source, starts, ends, axes], name, shape)

    def model(self, result, shape, opset=19):
        zero = self.graph.initializer("identity", np.eye(*shape[-2:], dtype=np.float32)[None, None])
        self.graph.node("Add", [result, zero], "T", shape)
        self.graph.output("T")
        return self.graph.model("sketch", opset, {"qinvert.profile": "npu-qdq-int8"}, "")


def blocks(sketch):
    source = sketch.input("M", 2, 32, 32)
    halves = ((0, 16), (16, 32))
    return [
        [sketch.cut(source, rows, columns, f"block_{i}{j}") for j, columns in enumerate(halves)]
        for i, rows in enumerate(halves)
    ]


def join(sketch, parts, name, axis, shape, **options):
    return sketch.operator("Concat", parts, name, [1, 2, *shape], axis=axis, **options)


def assembled(first_axis):
    sketch = Sketch()
    table = blocks(sketch)
    if first_axis == 2:
        parts = [join(sketch, [table[0][j], table[1][j]], f"column_{j}", 2, (32, 16)) for j in (0, 1)]
        return sketch.model(join(sketch, parts, "matrix", 3, (32, 32)), sketch.shape)
    parts = [join(sketch, table[i], f"row_{i}", -1, (16, 32)) for i in (0, 1)]
    return sketch.model(join(sketch, parts, "matrix", 2, (32, 32)), sketch.shape)


def test_blocks_that_are_assembled_from_rows_are_found():
    (finding,) = qinvert.export.lint(assembled(3))
    assert (finding.node, finding.rule) == ("matrix", "concat-order")
    assert "axis 2 first" in finding.remedy
    assert broken(assembled(2)) == set()


def test_one_row_under_finished_rows_is_no_finding():
    sketch = Sketch()
    table = blocks(sketch)
    lower = join(sketch, table[1], "row_1", 3, (16, 32))
    upper = sketch.cut("M/dq", (0, 16), (0, 32), "upper")
    assert broken(sketch.model(join(sketch, [upper, lower], "matrix", 2, (32, 32)), sketch.shape)) == set()


def test_pad_placement_is_found():
    sketch = Sketch()
    corner = blocks(sketch)[1][0]
    pads = sketch.graph.initializer("pads", np.array([0, 0, 16, 0, 0, 0, 0, 16]))
    placed = sketch.operator("Pad", [corner, pads], "placed", sketch.shape)
    (finding,) = qinvert.export.lint(sketch.model(placed, sketch.shape))
    assert (finding.node, finding.rule) == ("placed", "pad")


@pytest.mark.parametrize("second", [2.0**-6, 2.0**-5])
def test_constants_on_two_scales_are_found(second):
    sketch = Sketch()
    source = sketch.input("M", 2, 16, 16)
    ones = sketch.graph.initializer("ones", np.ones(sketch.shape, dtype=np.int8))
    for name, scale in (("first", 2.0**-6), ("second", second)):
        inputs = [ones, sketch.scale(scale), sketch.zero]
        sketch.graph.node("DequantizeLinear", inputs, f"{name}/ones", sketch.shape)
        source = sketch.operator("Add", [source, f"{name}/ones"], name, sketch.shape)
    findings = qinvert.export.lint(sketch.model(source, sketch.shape))
    wanted = [("ones", "shared-constants")] if second != 2.0**-6 else []
    assert [(f.node, f.rule) for f in findings] == wanted


def test_concats_over_two_scales_are_found():
    sketch = Sketch()
    (a, b), _ = blocks(sketch)
    finer = sketch.operator("Add", [b, b], "finer", [1, 2, 16, 16], scale=2.0**-7)
    upper = join(sketch, [a, finer], "upper", 3, (16, 32))
    model = sketch.model(upper, [1, 2, 16, 32])
    assert [(f.node, f.rule) for f in qinvert.export.lint(model)] == [("upper", "one-scale")]


def test_a_slice_onto_another_scale_is_found():
    sketch = Sketch()
    source = sketch.input("M", 2, 32, 32)
    indices = [sketch.graph.initializer(n, np.array([v])) for n, v in (("a", 0), ("b", 16), ("c", 2))]
    cut = sketch.operator("Slice", [source, *indices], "cut", [1, 2, 16, 32], scale=0.5)
    assert broken(sketch.model(cut, [1, 2, 16, 32])) == {"one-scale"}


def test_integer_concats_over_two_scales_are_found():
    def joined(scale):
        sketch = Sketch()
        sketch.input("M", 2, 16, 16)
        sketch.quantized(sketch.graph.input("N", sketch.shape), sketch.shape, scale)
        shape = [1, 2, 16, 32]
        both = sketch.graph.node("Concat", ["M/q", "N/q"], "both", shape, "int8", axis=3)
        inputs = [both, sketch.scale(2.0**-6), sketch.zero]
        return sketch.model(sketch.graph.node("DequantizeLinear", inputs, "real", shape), shape)

    assert broken(joined(2.0**-6), "int-ops") == set()
    assert broken(joined(2.0**-5), "int-ops") == {"one-scale"}


def test_a_product_without_quantization_is_found():
    sketch = Sketch()
    source = sketch.input("M", 2, 16, 16)
    square = sketch.graph.node("MatMul", [source, source], "square", sketch.shape)
    cube = sketch.operator("MatMul", [square, source], "cube", sketch.shape)
    findings = qinvert.export.lint(sketch.model(cube, sketch.shape))
    assert {f.rule for f in findings} == {"quantized"}
    assert {f.node for f in findings} == {"square", "cube"}


def test_an_unquantized_result_is_found():
    sketch = Sketch()
    source = sketch.input("M", 2, 16, 16)
    square = sketch.graph.node("MatMul", [source, source], "square", sketch.shape)
    sketch.graph.node("Add", [square, source], "T", sketch.shape)
    sketch.graph.output("T")
    model = sketch.graph.model("sketch", 19, {}, "")
    assert broken(model, "npu-qdq-int8") == {"quantized"}


def test_terms_of_an_accumulator_may_stay_float():
    sketch = Sketch()
    source = sketch.input("M", 2, 16, 16)
    square = sketch.graph.node("MatMul", [source, source], "square", sketch.shape)
    total = sketch.operator("Add", [square, source], "sum", sketch.shape)
    assert broken(sketch.model(total, sketch.shape)) == set()


@pytest.mark.parametrize("constant", ["identity", "ones"])
def test_only_the_identity_is_a_float_end(constant):
    sketch = Sketch()
    source = sketch.input("M", 2, 16, 16)
    model = sketch.model(source, sketch.shape)
    if constant == "ones":
        (tensor,) = (t for t in model.graph.initializer if t.name == "identity")
        tensor.CopyFrom(numpy_helper.from_array(np.ones((1, 1, 16, 16), dtype=np.float32), "identity"))
    assert broken(model) == ({"quantized"} if constant == "ones" else set())


@pytest.mark.parametrize(("depth", "rules"), [(1024, set()), (1040, {"accumulators"})])
def test_int8_products_stay_within_what_float32_holds(depth, rules):
    sketch = Sketch()
    source = sketch.input("M", 1, 16, depth)
    other = sketch.quantized(sketch.graph.input("N", [1, 1, depth, 16]), [1, 1, depth, 16])
    model = sketch.model(
        sketch.operator("MatMul", [source, other], "product", [1, 1, 16, 16]), [1, 1, 16, 16]
    )
    assert broken(model) == rules


def test_what_is_joined_on_another_grid_may_be_larger_there():
    sketch = Sketch()
    source = sketch.input("M", 1, 2080, 16)
    ones = sketch.graph.initializer("ones", np.ones((1, 1, 16, 1040), dtype=np.int8))
    inputs = [ones, sketch.scale(1.0), sketch.zero]
    real = sketch.graph.node("DequantizeLinear", inputs, "ones/dq", [1, 1, 16, 1040])

    def product(name, scale):
        both = sketch.operator("Concat", [real, real], name, [1, 1, 16, 2080], scale, axis=3)
        return sketch.operator("MatMul", [both, source], f"{name}/product", [1, 1, 16, 16])

    same, finer = product("same", 1.0), product("finer", 2.0**-6)
    total = sketch.operator("Add", [same, finer], "sum", [1, 1, 16, 16])
    findings = qinvert.export.lint(sketch.model(total, [1, 1, 16, 16]))
    assert [(f.node, f.rule) for f in findings] == [("finer", "one-scale"), ("finer/product", "accumulators")]


def int16_sketch(depth, right):
    sketch = Sketch("int16")
    left = sketch.input("M", 1, 16, depth)
    shape = [1, 1, depth, 16]
    sketch.graph.input("N", shape)
    sketch.element, sketch.zero = right, sketch.graph.initializer("zero/r", np.array(0, dtype=right))
    other = sketch.quantized("N", shape)
    sketch.element, sketch.zero = "int16", "zero"
    product = sketch.operator("MatMul", [left, other], "product", [1, 1, 16, 16])
    return sketch.model(product, [1, 1, 16, 16], 21)


def test_products_of_int16_by_int16_are_found():
    assert broken(int16_sketch(1, "int8"), "npu-qdq-int16") == set()
    (finding,) = qinvert.export.lint(int16_sketch(1, "int16"), "npu-qdq-int16")
    assert (finding.node, finding.rule) == ("product", "wide-products")


def test_int32_accumulators_that_overflow_are_found():
    assert 511 * 2**15 * 2**7 < INT32_LIMIT == 512 * 2**15 * 2**7
    assert broken(int16_sketch(511, "int8"), "npu-qdq-int16") == set()
    assert broken(int16_sketch(512, "int8"), "npu-qdq-int16") == {"accumulators"}


@pytest.mark.parametrize("profile", ["int-ops", "int-ops-x86", "qlinear", "qlinear-uint8", "npu-qdq-int8"])
def test_identity_blocks_are_counted_once_a_row(profile):
    # 1.0 is 16 times the largest integer: products widen to 17 times their depth.
    program = qinvert.block_merge(64, base=16, corrections=1)
    grid = Quantization(format=INT8, scale=float32(1 / 2031))
    layer = LayerPlan(
        program=program, tensors=dict.fromkeys(program.tensors, grid), requantize=Requantize.MULTIPLIER
    )
    model = build(qinvert.Plan(layers={"layer": layer}, target=profile))
    widths = [d.dim_value for v in model.graph.value_info for d in v.type.tensor_type.shape.dim[3:]]
    assert max(widths) * 128 * 127 > 2**24
    assert broken(model) == set()


def node_of(model, operator):
    return next(node for node in model.graph.node if node.op_type == operator)


def constant_of(model, name):
    return next(t for t in model.graph.initializer if t.name == name)


def set_scale(model, value):
    name = node_of(model, "QuantizeLinear").input[1]
    constant_of(model, name).CopyFrom(numpy_helper.from_array(np.array(value, dtype=np.float32), name))


def computed_scale(model):
    name = node_of(model, "QuantizeLinear").input[1]
    tensor = constant_of(model, name)
    model.graph.initializer.remove(tensor)
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 1, 1]))
    for node in model.graph.node:
        if name in node.input and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.attribute.append(helper.make_attribute("axis", 1))


def asymmetric(model):
    name = node_of(model, "QuantizeLinear").input[2]
    constant_of(model, name).CopyFrom(numpy_helper.from_array(np.array(3, dtype=np.int8), name))


def duplicate_name(model):
    model.graph.node[1].name = model.graph.node[0].name


def external(model):
    tensor = next(t for t in model.graph.initializer if t.name.startswith("indices/"))
    del tensor.external_data[:]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="elsewhere.bin")


def symbolic(model):
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[1].dim_param = "batch"


DAMAGES = {
    "opset": lambda m: setattr(m.opset_import[0], "version", 21),
    "names": lambda m: m.graph.node[0].ClearField("name"),
    "names twice": duplicate_name,
    "scales": lambda m: set_scale(m, 1e-31),
    "scales infinite": lambda m: set_scale(m, np.inf),
    "scales negative": lambda m: set_scale(m, -0.25),
    "types": asymmetric,
    "self-contained": external,
    "shapes": symbolic,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_breaks_its_rule_and_no_other(damage):
    model = build(planned())
    assert broken(model) == set()
    DAMAGES[damage](model)
    assert broken(model) == {damage.split()[0]}


def test_scales_that_are_computed_are_found():
    model = build(planned())
    computed_scale(model)
    assert "scales" in broken(model)


def test_scales_per_channel_are_found():
    sketch = Sketch()
    sketch.graph.initializer("scale/per_channel", np.full(16, 0.5, dtype=np.float32))
    sketch.graph.initializer("zero/per_channel", np.zeros(16, dtype=np.int8))
    source = sketch.graph.input("M", [1, 2, 16, 16])
    grid = ["scale/per_channel", "zero/per_channel"]
    stored = sketch.graph.node("QuantizeLinear", [source, *grid], "q", [1, 2, 16, 16], "int8", axis=3)
    real = sketch.graph.node("DequantizeLinear", [stored, *grid], "dq", [1, 2, 16, 16], axis=3)
    assert broken(sketch.model(real, [1, 2, 16, 16])) == {"scales", "types"}


def test_three_axes_are_found():
    sketch = Sketch()
    sketch.graph.input("M", [4, 16, 16])
    real = sketch.quantized("M", [4, 16, 16])
    assert broken(sketch.model(real, [1, 4, 16, 16])) == {"shapes"}


@pytest.mark.parametrize(
    ("written", "read", "rules"),
    [
        ("npu-qdq-int8", "npu-qdq-uint8", {"types"}),
        ("npu-qdq-uint8", "npu-qdq-int8", {"types"}),
        ("npu-qdq-int8", "ryzen-xint8", {"opset", "power-of-two-scales"}),
        ("npu-qdq-int8", "npu-qdq-int4", set()),
        ("ryzen-xint8", "npu-qdq-int8", set()),
        ("int-ops", "int-ops-x86", {"types"}),
        ("int-ops-x86", "int-ops", {"operators", "types"}),
        ("qlinear", "int-ops", {"operators"}),
        ("int-ops", "npu-qdq-int8", {"operators", "quantized"}),
    ],
)
def test_a_graph_of_one_profile_is_measured_by_another(written, read, rules):
    assert broken(build(planned(written, "masked")), read) == rules


def test_operators_of_other_domains_are_other_operators():
    model = build(planned())
    node_of(model, "QuantizeLinear").domain = "com.microsoft"
    model.opset_import.add(domain="com.microsoft", version=1)
    findings = [f for f in qinvert.export.lint(model) if f.rule == "operators"]
    assert [f.message for f in findings] == [
        "is com.microsoft.QuantizeLinear, which profile 'npu-qdq-int8' does not allow"
    ]


def test_control_flow_is_an_operator_that_is_not_allowed():
    model = build(planned())
    value = helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value_floats=[1.0])], "b", [], [value]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    node = helper.make_node("If", ["always"], ["unused"], name="if", then_branch=branch, else_branch=branch)
    model.graph.node.insert(0, node)
    assert [f.node for f in qinvert.export.lint(model) if f.rule == "operators"] == ["if"]


def test_a_float_graph_has_findings_for_every_product():
    shape = [1, 2, 16, 16]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "y"))
    nodes = [helper.make_node("MatMul", ["x", "x"], ["s"]), helper.make_node("Relu", ["s"], ["y"])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 17)]
    )
    assert broken(model, "npu-qdq-int8") == {"operators", "names", "quantized"}


def test_a_finding_names_node_rule_and_remedy():
    model = build(planned())
    model.graph.node[0].ClearField("name")
    (finding,) = qinvert.export.lint(model)
    assert str(finding) == (
        "'Mul that writes M/negated' has no node name; name every node after what it computes (rule names)"
    )
    assert isinstance(finding, qinvert.export.Finding)


def test_every_rule_has_a_graph_that_breaks_it():
    shown = {name.split()[0] for name in DAMAGES}
    by_hand = {
        "concat-order",
        "pad",
        "one-scale",
        "shared-constants",
        "folded-sums",
        "folded-products",
        "quantized",
        "accumulators",
        "wide-products",
    }
    assert shown | by_hand | {"operators", "power-of-two-scales"} == {*RULES, "self-contained"}


def test_what_is_no_graph_is_refused(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match="not an ONNX model"):
        qinvert.export.lint(tmp_path / "x.onnx", "int-ops")
    with pytest.raises(ExportError, match="the model is not an ONNX model"):
        qinvert.export.lint(onnx.ModelProto(), "int-ops")
    model = build(planned())
    with pytest.raises(ExportError, match="unknown profile 'toaster'"):
        qinvert.export.lint(model, "toaster")
    del model.metadata_props[:]
    with pytest.raises(ExportError, match="does not name a profile; pass"):
        qinvert.export.lint(model)


def test_hostile_sizes_cost_neither_memory_nor_the_stack():
    huge = 2**30
    sketch = Sketch()
    source = sketch.input("M", 1, huge, huge)
    product = sketch.operator("MatMul", [source, source], "product", sketch.shape)
    sketch.graph.output("product/dq")
    assert broken(sketch.graph.model("huge", 19, {}, ""), "npu-qdq-int8") == {"accumulators"}
    assert product == "product/dq"


def test_long_chains_are_walked():
    shape, last = [1, 1, 16, 16], "M"
    graph = GraphBuilder()
    graph.input("M", shape)
    for i in range(3000):
        last = graph.node("Cast", [last], f"cast_{i}", shape, to=TensorProto.FLOAT)
    last = graph.node("Concat", [last, last], "both", [1, 1, 16, 32], axis=3)
    for i in range(3000):
        last = graph.node("Cast", [last], f"again_{i}", [1, 1, 16, 32], to=TensorProto.FLOAT)
    graph.node("Add", [last, last], "T", [1, 1, 16, 32])
    graph.output("T")
    assert broken(graph.model("chain", 19, {}, ""), "int-ops") == set()


def test_contradicting_shapes_are_refused():
    model = build(planned())
    value = next(v for v in model.graph.value_info if v.name == "M/int8")
    value.type.tensor_type.shape.dim[3].dim_value = 7
    with pytest.raises(ExportError, match="shapes contradict"):
        qinvert.export.lint(model)


def test_random_damage_is_found_refused_or_harmless(tmp_path):
    content = build(planned()).SerializeToString()
    generator = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content)
        for position in generator.integers(len(content), size=3):
            damaged[position] ^= 1 << int(generator.integers(8))
        (tmp_path / "t.onnx").write_bytes(bytes(damaged))
        try:
            qinvert.export.lint(tmp_path / "t.onnx", "npu-qdq-int8")
        except qinvert.QInvertError:
            continue


def test_exports_end_with_the_rules(monkeypatch, tmp_path):
    strict = replace(PROFILES["npu-qdq-int8"], operators=PROFILES["npu-qdq-int8"].operators - {"Concat"})
    monkeypatch.setattr(exporting, "find_profile", lambda _: strict)
    with pytest.raises(ExportError, match=r"breaks a rule of profile .* is Concat, .* \(and \d+ more\)"):
        qinvert.export(planned(), tmp_path / "t.onnx")
    assert list(tmp_path.iterdir()) == []


def test_only_the_ends_of_a_factored_graph_may_stay_float(tmp_path):
    generator = torch.Generator().manual_seed(0)
    beta = torch.rand(8, 16, generator=generator)
    lower = from_keys(unit_keys(8, 16, 0.5, generator), beta, torch.zeros(8, 16))
    plan = qinvert.calibrate({"a": (lower, beta)}, factored=True)
    model = qinvert.export(plan, tmp_path / "t.onnx", batch=2, chains=1)
    assert lint(model) == []
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    grid = "beta/rows/dequantized"
    product = next(node for node in broken.graph.node if node.op_type == "Mul" and grid in node.input)
    product.input[list(product.input).index(grid)] = "beta/floored"
    assert {finding.rule for finding in lint(broken)} == {"quantized"}


def added(scale, result, operator="Add"):
    sketch = Sketch()
    other = sketch.quantized(sketch.graph.input("N", [1, 2, 16, 16]), [1, 2, 16, 16], scale)
    total = sketch.operator(operator, [sketch.input("M", 2, 16, 16), other], "total", sketch.shape, result)
    return sketch.model(total, sketch.shape)


@pytest.mark.parametrize(
    ("ratio", "rules"), [(29.9, set()), (30.1, {"folded-sums"}), (4.35e6, {"folded-sums"})]
)
def test_sums_whose_folded_zero_points_lose_too_much_are_found(ratio, rules):
    # The other ratios are 1: of the second operand, and of the result's own zero point.
    result = 2.0**-6
    assert broken(added(float32(ratio * result), result)) == rules


def test_sums_of_powers_of_two_are_exact_until_float32_overflows():
    assert broken(added(2.0**9, 2.0**-6)) == set()
    assert broken(added(2.0**14, 2.0**-6)) == {"folded-sums"}


@pytest.mark.parametrize(("ratio", "rules"), [(2.0**16, set()), (2.0**17, {"folded-products"})])
def test_products_that_leave_int32_before_they_saturate_are_found(ratio, rules):
    # The other operand's scale, 2^-6, is that of the result.
    assert broken(added(ratio, 2.0**-6, "Mul")) == rules
