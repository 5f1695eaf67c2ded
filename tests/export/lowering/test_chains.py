"""Graphs that are cut into chains: the same values, bit for bit, under names that are unique."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
from added_modules import added

import qinvert
from qinvert.errors import ExportError
from qinvert.export import lint
from qinvert.export.exporting import build, serialize
from qinvert.export.functions import build_layers
from qinvert.export.graph import GraphBuilder
from qinvert.export.reading import inlined
from qinvert.export.runtimes.onnxruntime_cpu import open_session
from qinvert.formats import INT8
from qinvert.hardware import find_hardware
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.profiles import PROFILES
from qinvert.program.ports import Port
from qinvert.program.program import Program
from qinvert.program.residual_sums import residuals_as_sums
from qinvert.program.steps import Axis, MatMul, Scale, Shape
from qinvert.stress import from_keys, stress_keys

CHUNK, BATCH = 16, 8
BITS = {"npu-qdq-int4": 4, "npu-qdq-int16": 16, "hexagon-int16": 16}
PROGRAMS = {
    "sums": residuals_as_sums(qinvert.elimination(CHUNK)),
    "packed": qinvert.block_merge(CHUNK, 4, corrections=1),
    "masked": qinvert.block_merge(CHUNK, 2, layout="masked"),
    "factored": qinvert.block_merge(CHUNK, factored=True),
}
KEYS = stress_keys(BATCH // 4, CHUNK, 24)
LOWER = from_keys(*KEYS.values())
FEED = {"L": LOWER[None].numpy(), "beta": KEYS["beta"][None, ..., None].numpy()}


@cache
def planned(profile, name="packed", bits=None):
    program = PROGRAMS[name]
    options = {"bits": bits or BITS.get(profile, 8), "target": profile, "min_sqnr_db": 0}
    factored = program.inverse_ports.factored
    return qinvert.calibrate((LOWER, KEYS["beta"]), method=program, factored=factored, **options)


def run(model, feed=None):
    names = {value.name for value in model.graph.input}
    feed = {name: value for name, value in (feed or FEED).items() if name in names}
    return open_session(serialize(model), threads=1).run(None, feed)


def names_of(model):
    graph = model.graph
    return [node.name for node in graph.node] + [output for node in graph.node for output in node.output]


@pytest.mark.parametrize(
    ("name", "chains", "output"),
    [("sums", 4, "integers"), ("packed", 2, "T"), ("masked", BATCH, "integers"), ("factored", 2, "T")],
)
@pytest.mark.parametrize("profile", PROFILES)
def test_values_do_not_depend_on_the_number_of_chains(profile, name, chains, output):
    plan = planned(profile, name)
    whole, cut = (build(plan, batch=BATCH, chains=count, output=output) for count in (1, chains))
    assert lint(cut) == []
    (expected,), (found,) = run(whole), run(cut)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


def test_two_planes_and_integer_inputs_go_through_chains_too():
    plan = planned("int-ops", "packed", "8x2")
    one, four = (run(build(plan, batch=BATCH, chains=chains)) for chains in (1, 4))
    assert np.array_equal(*one, *four)
    plan = planned("hexagon-int16", "sums")
    options = {"input": "M", "input_type": "integers", "output": "integers", "batch": BATCH}
    grid = plan.layer().input
    integers = {"M": np.rint(-FEED["L"] / grid.scale).astype(np.int32).__add__(32768).astype(np.uint16)}
    one, four = (run(build(plan, chains=chains, **options), integers) for chains in (1, 4))
    assert np.array_equal(*one, *four)
    assert one[0].dtype == np.uint16


def scaled():
    """A program that is no inverse, with a vector that multiplies rows."""
    shapes = {"a": Shape(1, 4, 8), "b": Shape(1, 8, 4), "v": Shape(1, 4, 1)}
    steps = (
        Scale(output="left", source="a", vector="v", axis=Axis.ROWS),
        MatMul(output="o", left="left", right="b"),
    )
    return Program(
        name="scaled",
        chunk=8,
        inputs=tuple(Port(name=name, shape=shape) for name, shape in shapes.items()),
        outputs=(Port(name="o", shape=Shape(1, 4, 4), tensor="o"),),
        steps=steps,
    )


@pytest.mark.parametrize("target", ["npu-qdq-int8", "qlinear"])
def test_ports_of_any_program_are_cut_and_joined(target):
    program = scaled()
    tensors = {name: Quantization(format=INT8, scale=float32(1 / 127)) for name in program.tensors}
    layer = LayerPlan(program=program, tensors=tensors, requantize=Requantize.MULTIPLIER)
    plan = Plan(layers={"layer": layer}, target=target)
    rng = np.random.default_rng(0)
    feed = {
        port.name: rng.uniform(-1, 1, (1, BATCH, *port.shape[1:])).astype(np.float32)
        for port in program.inputs
    }
    one, four = (run(build(plan, batch=BATCH, chains=chains), feed) for chains in (1, 4))
    assert np.array_equal(*one, *four)
    assert np.abs(one[0]).max() > 0.1


@pytest.mark.parametrize("profile", ["npu-qdq-int8", "hexagon-int16", "int-ops"])
def test_names_are_unique_and_constants_stand_once(profile):
    plan = planned(profile)
    model = build(plan, batch=BATCH, chains=4)
    one = build(plan, batch=2, chains=1)
    assert max(Counter(set(names_of(model))).values()) == 1
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    outputs = [output for node in model.graph.node for output in node.output]
    assert len(set(outputs)) == len(outputs)
    constants = {tensor.name for tensor in one.graph.initializer}
    assert {t.name for t in model.graph.initializer if "indices" not in t.name} <= constants
    # Every chain is the graph of its part, node by node.
    products = Counter(node.op_type for node in one.graph.node)
    found = Counter(node.op_type for node in model.graph.node)
    for kind in ("MatMul", "MatMulInteger"):
        assert found[kind] == 4 * products[kind]


def test_the_metadata_name_the_chains_and_verify_takes_the_graph(tmp_path):
    plan = planned("npu-qdq-int8")
    model = qinvert.export(plan, tmp_path / "t.onnx", batch=BATCH, chains=4)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert entries["qinvert.chains"] == "4"
    assert all(result.max_steps <= 1 for result in qinvert.verify(tmp_path / "t.onnx", plan, LOWER))
    one = build(plan, batch=BATCH, chains=1)
    assert "qinvert.chains" not in {entry.key for entry in one.metadata_props}


def test_functions_of_layers_hold_chains():
    plan = planned("npu-qdq-int8")
    many = Plan(layers={"a": plan.layer(), "b": plan.layer()}, target=plan.target)
    feed = {f"{name}/L": FEED["L"] for name in "ab"}
    one, two = (build_layers(many, batch=BATCH, chains=chains) for chains in (1, 2))
    assert [len(function.node) for function in two.functions] > [len(f.node) for f in one.functions]
    assert all(map(np.array_equal, run(one, feed), run(two, feed)))
    assert lint(inlined(two)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 8, "chains": 3}, "batch 8 cannot be cut into 3 chains of equal size; choose a divisor"),
        ({"batch": 2, "chains": 4}, "batch 2 cannot be cut into 4 chains"),
        ({"chains": 0}, r"chains 0 is not in \[1, 65536\]; or 'auto'"),
        ({"chains": 2.0}, r"chains 2.0 is not in"),
        ({"chains": "most"}, r"chains 'most' is not in .*; or 'auto'"),
    ],
)
def test_parts_of_unequal_size_are_refused(options, message):
    with pytest.raises(ExportError, match=message):
        build(planned("npu-qdq-int8"), **options)


def test_an_open_batch_is_not_cut():
    plan = planned("npu-qdq-int8")
    with pytest.raises(ExportError, match="chains 2 needs a batch that is fixed; pass batch, or chains=1"):
        build_layers(plan, batch=None, chains=2)
    model = build_layers(plan, batch=None)
    assert "qinvert.chains" not in {e.key for f in model.functions for e in f.metadata_props}


CHIP = """
from qinvert.hardware._hardware import Hardware, Table

def chip(name, whole, chained):
    return Hardware(
        name=name, summary="", unit="ticks", source="a test", date="2026-11-29", error=0.0, correlation=1.0,
        targets=("npu-qdq-int8",), tables={1: Table(whole={"call": whole}, chained={"call": chained})},
    )
"""


def chains_of(plan, **options):
    found = {e.key: e.value for e in build(plan, batch=BATCH, **options).metadata_props}
    return int(found.get("qinvert.chains", "1"))


def test_by_default_a_graph_has_the_chains_that_its_chip_wants(tmp_path):
    sources = {
        name: f'{CHIP}\nHARDWARE = chip("{name}", {whole}, {chained})'
        for name, whole, chained in (("eager", 9.0, 1.0), ("lazy", 1.0, 9.0))
    }
    with added("qinvert.hardware", tmp_path, **sources) as package:
        package.discover()
        plans = {name: qinvert.calibrate(LOWER, hardware=name, method="elimination") for name in sources}
        assert {name: plan.layer().provenance["chains"] for name, plan in plans.items()} == {
            "eager": 8,
            "lazy": 1,
        }
        assert {name: chains_of(plan) for name, plan in plans.items()} == {"eager": BATCH, "lazy": 1}
        assert chains_of(plans["eager"], chains=2) == 2
    # The chip is gone: that of the profile decides.
    assert chains_of(plans["eager"]) == chains_of(plans["lazy"])
    layer = plans["lazy"].layer()
    assert chains_of(plans["lazy"]) == find_hardware("hexagon-v81").best_chains(layer, BATCH)[0]
    # A profile without a chip has no use for chains.
    assert chains_of(planned("int-ops")) == 1


def test_nodes_of_one_name_are_not_inlined_twice():
    inner, outer = GraphBuilder(), GraphBuilder()
    inner.input("x", [1])
    inner.node("Neg", ["x"], "y", [1])
    outer.input("x", [1])
    outer.inline(inner, "a/", {"x": "x"})
    with pytest.raises(ExportError, match="two nodes write 'a/y'"):
        outer.inline(inner, "a/", {"x": "x"})


def test_a_program_that_returns_its_input_is_not_cut(tmp_path):
    plan = qinvert.calibrate(LOWER, method=qinvert.neumann(LOWER.shape[-1], order=1), min_sqnr_db=0)
    model = qinvert.export(plan, tmp_path / "t.onnx", batch=BATCH, chains=2)
    assert not any(node.op_type == "Slice" for node in model.graph.node)
    assert all(result.mismatches == 0 for result in qinvert.verify(tmp_path / "t.onnx", plan, LOWER))
