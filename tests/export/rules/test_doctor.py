"""What a compiler does not take is found in hand-made graphs, one for each cause, and nowhere else."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import qinvert
from qinvert.cli.app import cli
from qinvert.errors import ExportError, PlanError
from qinvert.export.rules.compiler_faults import CAUSES, Effect
from qinvert.export.rules.remedies import remedy_of
from qinvert.hardware import HARDWARE, Compiler, find_hardware
from qinvert.stress import stress_matrices

HEXAGON = "hexagon-v81"
SHAPE = (1, 2, 8, 8)


def value(name, shape=SHAPE, element=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, element, shape)


def graph(*nodes, inputs=(), outputs=(), constants=(), opset=21, ir=10, functions=()):
    """Nodes with the float inputs and outputs that they name."""
    read = [n for node in nodes for n in node.input]
    written = [n for node in nodes for n in node.output]
    known = {v.name for v in (*inputs, *outputs)} | {t.name for t in constants}
    ends = [value(n) for n in dict.fromkeys(read) if n and n not in written and n not in known]
    last = [value(n, None) for n in written if n not in read and n not in known]
    body = helper.make_graph(nodes, "graph", [*inputs, *ends], [*outputs, *last], constants)
    domains = sorted({"", *(node.domain for node in nodes)})
    versions = [helper.make_opsetid(domain, 1 if domain else opset) for domain in domains]
    return helper.make_model(body, opset_imports=versions, ir_version=ir, functions=functions)


def node(operator, inputs, outputs="y", **options):
    return helper.make_node(operator, inputs.split(), outputs.split(), name=operator.lower(), **options)


def constant(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def quantized(operator, **options):
    """An operator between integer grids."""
    grid = [constant("s", np.float32(0.1)), constant("z", np.uint8(128))]
    return graph(
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        helper.make_node(operator, ["d", *options.pop("more", ())], ["o"], name="inner", **options),
        helper.make_node("QuantizeLinear", ["o", "s", "z"], ["p"], name="last"),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["y"], name="result"),
        constants=[*grid, constant("axis", np.int64(3))],
    )


def scan(*nodes):
    body = helper.make_graph(nodes, "body", [value("state", (8, 8)), value("item", (8, 8))],
                             [value("next", (8, 8)), value("out", (8, 8))])  # fmt: skip
    loop = helper.make_node("Scan", ["s0", "xs"], ["last", "ys"], name="loop", body=body, num_scan_inputs=1)
    return graph(loop, inputs=[value("s0", (8, 8)), value("xs", (4, 8, 8))])


def five_axes(operator, **options):
    ends = {"inputs": [value("x", (1, 2, 2, 8, 8))], "outputs": [value("y", (1, 2, 2, 8, 8))]}
    return graph(node(operator, "x", **options), **ends)


#: A graph with a fault by its cause, the node that is to blame, and the effect.
FAULTS = {
    "operator set": (graph(node("Neg", "x"), opset=27, ir=13), "graph", Effect.REFUSED),
    "IR version": (graph(node("Neg", "x"), ir=14), "graph", Effect.REFUSED),
    "dynamic shape": (graph(node("Neg", "x"), inputs=[value("x", ("B", 8))]), "x", Effect.REFUSED),
    "data-dependent shape": (
        graph(node("NonZero", "x"), outputs=[value("y", (4, None), TensorProto.INT64)]),
        "nonzero",
        Effect.REFUSED,
    ),
    "operator missing": (graph(node("Trilu", "x")), "trilu", Effect.REFUSED),
    "rank above 4": (five_axes("Tanh"), "tanh", Effect.REFUSED),
    "element type": (
        graph(node("Neg", "x"), inputs=[value("x", SHAPE, TensorProto.DOUBLE)],
              outputs=[value("y", SHAPE, TensorProto.DOUBLE)]),
        "neg",
        Effect.REFUSED,
    ),
    "float32 product": (graph(node("MatMul", "x z")), "matmul", Effect.FLOAT),
    "wrong values": (quantized("CumSum", more=["axis"]), "inner", Effect.WRONG),
}  # fmt: skip


def found(model, hardware=HEXAGON):
    return {(group.cause, group.effect): group for group in qinvert.doctor(model, hardware=hardware).groups}


@pytest.mark.parametrize("cause", FAULTS)
def test_every_cause_is_found_where_it_is(cause):
    model, blamed, effect = FAULTS[cause]
    before = model.SerializeToString()
    groups = found(model)
    assert groups.keys() == {(cause, effect)}
    (group,) = groups.values()
    assert (group.count, group.nodes) == (1, (blamed,))
    assert group.remedy
    assert model.SerializeToString() == before


def test_every_cause_has_a_case():
    others = {"float operator", "broken rule"}
    assert CAUSES.keys() == FAULTS.keys() | others


@pytest.mark.parametrize(
    "model",
    [
        graph(node("Neg", "x")),
        five_axes("Abs"),
        quantized("Neg"),
        # A mask that is constant is computed before the graph is compiled, and so is what shapes say.
        graph(node("Trilu", "ones", "mask"), node("Mul", "x mask"),
              constants=[constant("ones", np.ones((8, 8), np.float32))]),
        graph(node("Shape", "x", "shape"), node("Reshape", "x shape")),
    ],
)  # fmt: skip
def test_what_a_compiler_takes_is_no_fault(model):
    diagnosis = qinvert.doctor(model, hardware=HEXAGON)
    assert diagnosis.accepted
    assert diagnosis.count(Effect.REFUSED) == diagnosis.count(Effect.WRONG) == 0


def test_five_axes_are_taken_here_and_refused_elsewhere_and_six_nowhere():
    assert {effect for _, effect in found(five_axes("Abs"))} == {Effect.ELSEWHERE}
    six = (1, 1, 2, 2, 8, 8)
    model = graph(node("Abs", "x"), inputs=[value("x", six)], outputs=[value("y", six)])
    assert {effect for _, effect in found(model)} == {Effect.REFUSED}


def test_loops_are_looked_into():
    inner = [node("Trilu", "item", "lower"), node("Add", "state lower", "next"), node("Neg", "next", "out")]
    diagnosis = qinvert.doctor(scan(*inner), hardware=HEXAGON)
    assert diagnosis.nodes == 4
    kinds = {kind: group.remedy for group in diagnosis.groups for kind in group.kinds}
    assert kinds.keys() == {"Scan", "Trilu"}
    assert "chunk step" in kinds["Scan"]


def test_functions_are_looked_into():
    body = [helper.make_node("EyeLike", ["a"], ["b"], name="inside")]
    function = helper.make_function("own", "F", ["a"], ["b"], body, [helper.make_opsetid("", 21)])
    model = graph(
        node("F", "x", domain="own"),
        inputs=[value("x", (8, 8))],
        outputs=[value("y", (8, 8))],
        functions=[function],
    )
    ((cause, _),) = found(model)
    assert cause == "operator missing"


def test_many_nodes_are_one_group_with_the_first_names():
    nodes = [helper.make_node("Trilu", [f"x{i}"], [f"x{i + 1}"], name=f"mask{i}") for i in range(200)]
    diagnosis = qinvert.doctor(graph(*nodes, inputs=[value("x0")]), hardware=HEXAGON)
    (group,) = diagnosis.groups
    assert (group.count, group.kinds, group.nodes) == (200, {"Trilu": 200}, ("mask0", "mask1", "mask2"))
    assert not diagnosis.accepted
    assert len(str(diagnosis).splitlines()) == 2
    assert "200 that it does not take" in diagnosis.verdict


def test_weights_in_other_files_are_not_read(tmp_path):
    model = graph(node("MatMul", "x w"), constants=[constant("w", np.ones((8, 8), np.float32))])
    options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0}
    onnx.save(model, tmp_path / "model.onnx", **options)
    (tmp_path / "w.bin").unlink()
    ((cause, effect),) = found(tmp_path / "model.onnx")
    assert (cause, effect) == ("float32 product", Effect.FLOAT)


@pytest.fixture(scope="module")
def plans():
    lower = stress_matrices("correlated_keys", 4, 32)
    return {
        target: qinvert.calibrate(lower, target=target, min_sqnr_db=0, method="block_merge")
        for target in ("hexagon-uint8", "ethos-int8", "int-ops")
    }


@pytest.mark.parametrize(
    ("target", "hardware"),
    [("hexagon-uint8", HEXAGON), ("hexagon-uint8", "hexagon-v73"), ("ethos-int8", "ethos-u55-128")],
)
def test_what_is_exported_for_a_chip_is_taken_as_it_is(plans, tmp_path, target, hardware):
    qinvert.export(plans[target], tmp_path / "t.onnx")
    diagnosis = qinvert.doctor(tmp_path / "t.onnx", hardware=hardware)
    assert diagnosis.groups == ()
    assert diagnosis.verdict.endswith("all on the chip")
    assert diagnosis.nodes > 20


def test_the_chip_is_that_of_the_profile_unless_another_is_named(plans, tmp_path):
    qinvert.export(plans["hexagon-uint8"], tmp_path / "t.onnx")
    assert qinvert.doctor(tmp_path / "t.onnx").hardware == find_hardware("hexagon-v81").name
    qinvert.export(plans["int-ops"], tmp_path / "i.onnx")
    with pytest.raises(ExportError, match="does not name a chip; pass hardware=, one of"):
        qinvert.doctor(tmp_path / "i.onnx")
    groups = qinvert.doctor(tmp_path / "i.onnx", hardware=HEXAGON).groups
    (remedy,) = [group.remedy for group in groups if "MatMulInteger" in group.kinds]
    assert "QDQ profile" in remedy


def test_floats_have_no_place_on_a_chip_without_them():
    groups = found(quantized("Neg"), "ethos-u55-128")
    assert {kind for group in groups.values() for kind in group.kinds} == {"Neg"}
    groups = found(graph(node("Add", "x z")), "ethos-u55-128")
    assert groups.keys() == {("float operator", Effect.REFUSED)}


def test_a_broken_rule_is_a_wrong_value():
    # One constant on two grids is the fault of the rule shared-constants.
    grid = [constant("s1", np.float32(0.1)), constant("s2", np.float32(0.2)), constant("z1", np.uint8(128))]
    model = graph(
        helper.make_node("DequantizeLinear", ["c", "s1", "z1"], ["a"], name="a"),
        helper.make_node("DequantizeLinear", ["c", "s2", "z1"], ["b"], name="b"),
        node("Add", "x a", "o"),
        node("Sub", "o b"),
        constants=[*grid, constant("c", np.zeros((8, 8), np.uint8))],
    )
    group = found(model)["broken rule", Effect.WRONG]
    assert group.kinds == {"shared-constants": 1}


def test_a_chip_is_known_or_refused():
    model = graph(node("Neg", "x"))
    with pytest.raises(PlanError, match="unknown hardware 'nope'"):
        qinvert.doctor(model, hardware="nope")
    with pytest.raises(ExportError, match="nothing is known of a compiler for gpu; use one of"):
        qinvert.doctor(model, hardware="gpu")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "t.onnx").write_bytes(b"text")
    with pytest.raises(ExportError, match="not an ONNX model"):
        qinvert.doctor(tmp_path / "t.onnx", hardware=HEXAGON)


@pytest.mark.parametrize(
    "change", [{"operators": frozenset()}, {"opset": 0}, {"most_axes": 3}, {"ir_version": True}]
)
def test_a_compiler_names_the_field_that_is_wrong(change):
    compiler = find_hardware(HEXAGON).compiler
    with pytest.raises(PlanError, match="compiler"):
        replace(compiler, **change)


@pytest.mark.parametrize("name", [n for n, chip in HARDWARE.items() if chip.compiler])
def test_a_remedy_names_what_the_compiler_takes(name):
    compiler = HARDWARE[name].compiler
    assert isinstance(compiler, Compiler)
    assert remedy_of("com.microsoft.MatMul", compiler) == "export it with ONNX's own operator MatMul"
    assert "host" in remedy_of("com.microsoft.Unheard", compiler)


def command(*arguments):
    return CliRunner().invoke(cli, ["doctor", *map(str, arguments)])


def test_the_command_prints_groups_and_gates_on_demand(tmp_path):
    onnx.save(graph(node("Trilu", "x")), tmp_path / "t.onnx")
    result = command(tmp_path / "t.onnx", "--hardware", HEXAGON)
    assert result.exit_code == 0
    assert [line[:2] for line in result.stdout.splitlines()] == ["he", "  ", "  "]
    assert command(tmp_path / "t.onnx", "--hardware", HEXAGON, "--strict").exit_code == 1
    onnx.save(graph(node("Neg", "x")), tmp_path / "n.onnx")
    assert command(tmp_path / "n.onnx", "--hardware", HEXAGON, "--strict").exit_code == 0


def test_the_command_answers_in_json_for_several_chips(tmp_path):
    onnx.save(graph(node("Trilu", "x")), tmp_path / "t.onnx")
    chips = ["--hardware", HEXAGON, "--hardware", "ethos-u85-256"]
    document = json.loads(command(tmp_path / "t.onnx", *chips, "--json").stdout)
    assert document.keys() == {HEXAGON, "ethos-u85-256"}
    (group,) = document[HEXAGON]["groups"]
    assert (group["count"], group["kinds"], document[HEXAGON]["accepted"]) == (1, {"Trilu": 1}, False)


def test_the_command_says_which_chips_there_are(tmp_path):
    onnx.save(graph(node("Neg", "x")), tmp_path / "n.onnx")
    result = command(tmp_path / "n.onnx")
    assert result.exit_code == 2
    assert "pass hardware=, one of" in result.stderr
