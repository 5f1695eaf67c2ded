"""Legal hosts of many kinds: each runs in onnxruntime before and after graft, with the same outputs.

In the place of the plan's functions stands an exact inverse, so that nothing but
float32 rounding may differ.
"""

import os
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import qinvert
from qinvert.export.reading import within
from qinvert.export.whole_models import chunked_nodes, export_model
from qinvert.export.whole_models.chunked_nodes import ChunkedNodes
from qinvert.stress import stress_matrices

pytest.importorskip("onnxscript", reason="pip install 'qinvert[model]'")
pytestmark = pytest.mark.filterwarnings("ignore")

HEADS, KEY, VALUE, CHUNK, LENGTH = 2, 8, 8, 8, 19
ORDER = ("query", "key", "value", "past_state", "decay", "beta")
WIDTHS = {"query": HEADS * KEY, "key": HEADS * KEY, "value": HEADS * VALUE, "decay": HEADS, "beta": HEADS}
STATE = (HEADS, KEY, VALUE)
MICROSOFT = "com.microsoft"
TYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


@dataclass(kw_only=True)
class Host:
    """A model with one or more nodes, and every choice that an exporter has."""

    element: int = TensorProto.FLOAT
    past: bool = True
    nodes: list = field(default_factory=list)
    #: Nodes before and after those of the host.
    before: list = field(default_factory=list)
    after: list = field(default_factory=list)
    initializers: list = field(default_factory=list)
    inputs: list = field(default_factory=list)
    outputs: dict = field(default_factory=dict)
    value_info: list = field(default_factory=list)
    functions: list = field(default_factory=list)
    opsets: dict = field(default_factory=lambda: {"": 21, MICROSOFT: 1})
    ir: int = 10
    state_shape: tuple = ("B", *STATE)
    open_shapes: bool = False

    def model(self):
        shapes = {name: ("B", "T", width) for name, width in WIDTHS.items()}
        shapes |= {"past_state": self.state_shape} if self.past else {}
        given = [helper.make_tensor_value_info(name, self.element, shape) for name, shape in shapes.items()]
        nodes = self.nodes or [node(past=self.past)]
        outputs = self.outputs or {name: self.element for n in nodes for name in n.output if name}
        graph = helper.make_graph(
            [*self.before, *nodes, *self.after],
            "host",
            [*given, *self.inputs],
            [helper.make_tensor_value_info(name, element, None) for name, element in outputs.items()],
            self.initializers,
            value_info=self.value_info,
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=self.ir, functions=self.functions, producer_name="x"
        )

    def data(self):
        rng = np.random.default_rng(1)
        found = {name: rng.standard_normal((2, LENGTH, width)) for name, width in WIDTHS.items()}
        keys = found["key"].reshape(2, LENGTH, HEADS, KEY)
        found["key"] = (keys / np.linalg.norm(keys, axis=-1, keepdims=True)).reshape(2, LENGTH, -1)
        found["decay"] = -0.3 * abs(found["decay"])
        found["beta"] = 1 / (1 + np.exp(-found["beta"]))
        if self.past:
            found["past_state"] = rng.standard_normal((2, *STATE))
        return {name: x.astype(TYPES[self.element]) for name, x in found.items()}


def node(name="attention", prefix="", past=True, inputs=None, **options):
    names = [(inputs or {}).get(key, key) for key in ORDER]
    if not past:
        names[3] = ""
    attributes = {"q_num_heads": HEADS, "kv_num_heads": HEADS, "update_rule": "gated_delta", "scale": 0.5}
    domain = options.pop("domain", MICROSOFT)
    outputs = options.pop("outputs", ("output", "present_state"))
    return helper.make_node(
        "LinearAttention",
        names,
        [f"{prefix}{output}" if output else "" for output in outputs],
        name=name,
        domain=domain,
        **attributes | options,
    )


def weights(name, rows=HEADS * KEY, columns=HEADS * KEY, dtype=np.float32):
    values = np.random.default_rng(2).standard_normal((rows, columns)) / rows**0.5
    return numpy_helper.from_array(values.astype(dtype), name)


def constant(tensor):
    return helper.make_node("Constant", [], [tensor.name], value=tensor)


def projected(**options):
    """Queries come from a product whose sizes only shape inference knows."""
    product = helper.make_node("MatMul", ["query", "weights"], ["projected"], name="product")
    return {"before": [product], "nodes": [node(inputs={"query": "projected"})], **options}


def looped():
    """After the node an If, whose branches read what the node wrote."""
    body = [
        helper.make_graph(
            [helper.make_node(kind, ["output"], [kind])],
            kind,
            [],
            [helper.make_tensor_value_info(kind, TensorProto.FLOAT, None)],
        )
        for kind in ("Neg", "Abs")
    ]
    choice = helper.make_node("If", ["always"], ["chosen"], then_branch=body[0], else_branch=body[1])
    always = numpy_helper.from_array(np.array(True), "always")
    return {"after": [choice], "initializers": [always], "outputs": {"chosen": 1, "present_state": 1}}


def local_function(domain="other", name="Twice"):
    twice = helper.make_node("Add", ["x", "x"], ["y"], name="attention")
    return helper.make_function(domain, name, ["x"], ["y"], [twice], [helper.make_opsetid("", 21)])


def with_function(domain="other", name="Twice"):
    call = helper.make_node(name, ["query"], ["doubled"], name="val_1", domain=domain)
    declared = helper.make_tensor_value_info("doubled", TensorProto.FLOAT, ("B", "T", HEADS * KEY))
    return {
        "before": [call],
        "nodes": [node(inputs={"query": "doubled"})],
        "functions": [local_function(domain, name)],
        "opsets": {"": 21, MICROSOFT: 1, domain: 1},
        "value_info": [declared],
    }


def two(first="first", second="second", **options):
    """The second node reads the values of the first one."""
    return {
        "nodes": [
            node(first, "1_"),
            node(second, "2_", inputs={"value": "1_output", "past_state": "1_present_state"}),
        ],
        **options,
    }


def clashing():
    """Names that a trace, or an inlined function, might give to its own tensors."""
    names = [
        "val_0",
        "val_1",
        "L",
        "T",
        "query_1",
        "DeltaRule_TriInv_layer",
        "attention/output",
        "node_Shape_0",
    ]
    chain = [
        helper.make_node("Identity", [a], [b], name=b)
        for a, b in zip(["query", *names], [*names, "last"], strict=True)
    ]
    declared = helper.make_tensor_value_info("last", TensorProto.FLOAT, ("B", "T", HEADS * KEY))
    return {"before": chain, "nodes": [node("val_2", inputs={"query": "last"})], "value_info": [declared]}


HALF = TensorProto.FLOAT16
HOSTS = {
    "as it is": {},
    "ai.onnx for the empty domain": {"opsets": {"ai.onnx": 21, MICROSOFT: 1}},
    "both spellings": {"opsets": {"": 21, "ai.onnx": 21, MICROSOFT: 1}},
    "nodes of ai.onnx": {
        **projected(initializers=[weights("weights")]),
        "before": [helper.make_node("MatMul", ["query", "weights"], ["projected"], domain="ai.onnx")],
    },
    "operator set 18": {"opsets": {"": 18, MICROSOFT: 1}},
    "operator set 26": {"opsets": {"": 26, MICROSOFT: 1}, "ir": 13},
    "IR version 4": {"ir": 4},
    "IR version 8": {"ir": 8},
    "IR version 11": {"ir": 11},
    "IR version 13": {"ir": 13},
    "IR version 3, constants among the inputs": {
        **projected(initializers=[weights("weights")]),
        "ir": 3,
        "inputs": [helper.make_tensor_value_info("weights", TensorProto.FLOAT, (HEADS * KEY, HEADS * KEY))],
    },
    "float16": {"element": HALF},
    "symbolic state": {"state_shape": ("B", "H", "K", "V")},
    "state without sizes": {"state_shape": (None, None, None, None)},
    "state without a shape": {"state_shape": None},
    "sizes from weights": projected(initializers=[weights("weights")]),
    "weights as a node": {
        **projected(),
        "before": [constant(weights("weights")), *projected()["before"]],
    },
    "read in branches": looped(),
    "a local function": with_function(),
    "a local function in our domain": with_function("qinvert", "TriInv_layer"),
    "a local function with our inner name": with_function("qinvert", "DeltaRule_0"),
    "two nodes": two(),
    "two nodes without names": two("", ""),
    "a name like that of an output": two("1_output", "attention"),
    "clashing names": clashing(),
    "a chunk size": {"nodes": [node(chunk_size=32)]},
}  # fmt: skip


def exact_function(name, opset):
    """``(I - L)(I + L^2)(I + L^4)``: what a plan for chunks of 8 approximates, in float32."""
    eye = numpy_helper.from_array(np.eye(CHUNK, dtype=np.float32)[None, None], "eye")
    nodes = [constant(eye)]
    nodes += [helper.make_node("Neg", ["L"], ["power0"]), helper.make_node("Sub", ["eye", "L"], ["t0"])]
    for i in range(2):
        nodes += [
            helper.make_node("MatMul", [f"power{i}"] * 2, [f"power{i + 1}"]),
            helper.make_node("MatMul", [f"t{i}", f"power{i + 1}"], [f"step{i}"]),
            helper.make_node("Add", [f"t{i}", f"step{i}"], ["T" if i == 1 else f"t{i + 1}"]),
        ]
    return helper.make_function("qinvert", name, ["L"], ["T"], nodes, [helper.make_opsetid("", opset)])


def with_exact_inverse(path, taken):
    """Write the model with an exact inverse in every function that graft has added, and return its path."""
    model = onnx.load(path)
    for function in model.functions:
        if (function.domain, function.name) not in taken:
            assert function.name.startswith("TriInv_")
            function.CopyFrom(exact_function(function.name, opset(model)))
    exact = path.with_name("exact.onnx")
    onnx.save(model, exact)
    return exact


def run(path, given):
    return onnxruntime.InferenceSession(str(path)).run(None, given)


@pytest.fixture(scope="module")
def plan():
    return qinvert.calibrate(stress_matrices("independent_keys", 8, CHUNK), method="block_merge")


@pytest.fixture(autouse=True)
def traced_once(monkeypatch, traces):
    """Nodes that are alike are traced once: tracing takes seconds, and is tested elsewhere."""
    trace = ChunkedNodes._trace

    def cached(self, node, layer):
        key = (min(self._opset, chunked_nodes.LAST_OPSET), node.signature)
        if key not in traces:
            traces[key] = trace(self, node, layer), self._names[layer]
        graph = onnx.GraphProto()
        graph.CopyFrom(traces[key][0])
        chunked_nodes._rename_calls(graph, {traces[key][1]: self._names[layer]})
        return graph

    monkeypatch.setattr(ChunkedNodes, "_trace", cached)


@pytest.fixture(scope="module")
def traces():
    return {}


def opset(model):
    """Version of ONNX's own operators, whichever way the model spells their domain."""
    found = {entry.domain: entry.version for entry in model.opset_import}
    return found.get("", found.get("ai.onnx"))


def check(plan, folder, model, given, tolerance=1e-5):
    path, out = folder / "in.onnx", folder / "out.onnx"
    if not path.exists():
        onnx.save(model, path)
    before = path.read_bytes()
    expected = run(path, given)
    qinvert.graft(path, plan, out)
    taken = {(function.domain, function.name) for function in model.functions}
    written = onnx.load(out)
    assert "LinearAttention" not in {n.op_type for n in written.graph.node}
    assert [value.name for value in written.graph.output] == [v.name for v in model.graph.output]
    # Local functions came with IR version 8, and the types of their tensors with 10.
    assert written.ir_version == max(model.ir_version, 8)
    assert written.ir_version >= 10 or not any(function.value_info for function in written.functions)
    assert opset(written) == opset(model)
    for actual, wanted in zip(run(with_exact_inverse(out, taken), given), expected, strict=True):
        assert actual.shape == wanted.shape
        assert actual.dtype == wanted.dtype
        assert np.isfinite(wanted).all()
        assert np.abs(actual - wanted).max() <= tolerance * np.abs(wanted).max()
    # And with the plan's own functions onnxruntime runs it, too.
    assert all(np.isfinite(x).all() for x in run(out, given))
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_computes_the_same_before_and_after(plan, tmp_path, name):
    host = Host(**HOSTS[name])
    check(plan, tmp_path, host.model(), host.data(), 2e-3 if host.element == HALF else 1e-5)


def test_float16_may_leave_its_range_inside_as_in_the_kernel(plan, tmp_path):
    host = Host(element=HALF)
    given = host.data()
    given["query"] = np.clip(given["query"].astype(np.float32) * 6e4, -6e4, 6e4).astype(np.float16)
    for name in ("value", "past_state"):
        given[name] = given[name] * np.float16(1e-2)
    # Queries times the node's factor, 0.5, over that of the function, 8 ** -0.5, are none of float16.
    assert np.finfo(np.float16).max < 6e4 * 0.5 * 8**0.5
    check(plan, tmp_path, host.model(), given, 2e-3)


def test_inputs_without_a_shape_go_through(plan, tmp_path):
    host = Host(
        inputs=[helper.make_tensor_value_info("open", TensorProto.FLOAT, None)],
        before=[helper.make_node("Neg", ["open"], ["negated"])],
        outputs={"output": 1, "present_state": 1, "negated": 1},
    )
    check(plan, tmp_path, host.model(), host.data() | {"open": np.ones((2, 3), np.float32)})
    shapes = {value.name: value.type.tensor_type for value in onnx.load(tmp_path / "out.onnx").graph.output}
    # What the node says of its outputs is written down, and nothing is said of the other.
    assert [d.dim_value for d in shapes["present_state"].shape.dim] == [0, *STATE]
    assert not shapes["negated"].HasField("shape")


@pytest.mark.parametrize("limit", [2**30, 256])
def test_weights_may_lie_in_another_file(plan, tmp_path, monkeypatch, limit):
    host = Host(**projected(initializers=[weights("weights")]))
    onnx.save(
        host.model(), tmp_path / "in.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    assert (tmp_path / "w.bin").exists()
    monkeypatch.setattr(export_model, "MAX_BYTES", limit)
    check(plan, tmp_path, host.model(), host.data())
    written = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    (stored,) = [tensor for tensor in written.graph.initializer if tensor.name == "weights"]
    assert (stored.data_location == TensorProto.EXTERNAL) == (limit == 256)
    assert len(list(tmp_path.glob("out.onnx.*.data"))) == (limit == 256)
    (loaded,) = [t for t in onnx.load(tmp_path / "out.onnx").graph.initializer if t.name == "weights"]
    assert np.array_equal(numpy_helper.to_array(loaded), numpy_helper.to_array(weights("weights")))


def test_weights_of_one_file_may_lack_their_lengths(plan, tmp_path):
    host = Host(**projected(initializers=[weights("weights")]))
    onnx.save(
        host.model(), tmp_path / "in.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    # As onnxruntime reads it: the type and the shape say how long a tensor is, whatever follows in the file.
    with (tmp_path / "w.bin").open("ab") as file:
        file.truncate(2**40)
    model = onnx.load(tmp_path / "in.onnx", load_external_data=False)
    (tensor,) = model.graph.initializer
    kept = [entry for entry in tensor.external_data if entry.key != "length"]
    assert len(kept) < len(tensor.external_data)
    del tensor.external_data[:]
    tensor.external_data.extend(kept)
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    check(plan, tmp_path, model, host.data())


def test_external_weights_and_open_shapes_together(plan, tmp_path, monkeypatch):
    host = Host(
        initializers=[weights("weights")],
        inputs=[helper.make_tensor_value_info("open", TensorProto.FLOAT, None)],
        before=[helper.make_node("MatMul", ["open", "weights"], ["turned"])],
        outputs={"output": 1, "present_state": 1, "turned": 1},
    )
    monkeypatch.setattr(export_model, "MAX_BYTES", 256)
    given = host.data() | {"open": np.ones((3, HEADS * KEY), np.float32)}
    check(plan, tmp_path, host.model(), given)
    assert sorted(path.suffix for path in tmp_path.glob("out.onnx*")) == [".data", ".onnx"]


def test_all_nodes_pass_the_inliner_at_once_and_are_traced_once(plan, tmp_path, monkeypatch):
    """Also where each has a layer of its own, which must be called in its place."""
    nodes = [node(str(i), f"{i}_", inputs={"value": f"{i - 1}_output"} if i else None) for i in range(4)]
    onnx.save(Host(nodes=nodes).model(), tmp_path / "in.onnx")
    passes, made, inline, trace = [], [], onnx.inliner.inline_selected_functions, ChunkedNodes._trace
    monkeypatch.setattr(
        onnx.inliner, "inline_selected_functions", lambda *given: passes.append(0) or inline(*given)
    )
    monkeypatch.setattr(ChunkedNodes, "_trace", lambda *given: made.append(0) or trace(*given))
    layers = replace(plan, layers={f"layers.{i}": plan.layer() for i in range(4)})
    after = qinvert.graft(tmp_path / "in.onnx", layers, tmp_path / "out.onnx")
    assert (len(passes), len(made)) == (1, 1)
    called = [n.op_type for n in within(after.graph.node) if n.domain == "qinvert"]
    assert called == [f"TriInv_layers_{i}" for i in range(4)]


def with_weights_outside(folder, location):
    host = Host(**projected(initializers=[weights("weights")]))
    options = {"save_as_external_data": True, "location": location, "size_threshold": 0}
    onnx.save(host.model(), folder / "in.onnx", **options)


@pytest.mark.parametrize("link", ["itself", "hard link", "weights"])
def test_graft_never_overwrites_its_input(plan, tmp_path, link):
    with_weights_outside(tmp_path, "w.bin")
    before = {name: (tmp_path / name).read_bytes() for name in ("in.onnx", "w.bin")}
    target = tmp_path / {"itself": "in.onnx", "hard link": "other.onnx", "weights": "w.bin"}[link]
    if link == "hard link":
        target.hardlink_to(tmp_path / "in.onnx")
    with pytest.raises(qinvert.ExportError, match="write to another file"):
        qinvert.graft(tmp_path / "in.onnx", plan, target)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_weights_of_the_host_stay_whatever_they_are_called(plan, tmp_path):
    # As after an export to out.onnx, whose model was then renamed.
    name = "out.onnx.0123abcd.data"
    with_weights_outside(tmp_path, name)
    old = tmp_path / "out.onnx.99999999.data"
    old.write_bytes(b"of an earlier export")
    for file in (tmp_path / name, old):
        os.utime(file, (0, 0))
    qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "out.onnx")
    assert (tmp_path / name).exists()
    assert not old.exists()
