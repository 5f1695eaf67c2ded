"""LinearAttention nodes replaced by chunks, against onnxruntime's own kernel."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import qinvert
from qinvert.cli.app import cli
from qinvert.delta_rule.rule import from_keys
from qinvert.errors import ExportError, PlanError
from qinvert.export.whole_models.chunked_nodes import ChunkedNode
from qinvert.export.whole_models.graft import _assigned
from qinvert.export.whole_models.linear_attention_nodes import find_nodes
from qinvert.export.whole_models.tracing import trace
from qinvert.metrics import ErrorStatistics

pytest.importorskip("onnxscript", reason="pip install 'qinvert[model]'")
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTHS = (1, 15, 16, 17, 50)
# Small chunks keep the tests short; what a trace makes of them is the same.
HEADS, KEY, VALUE, CHUNK = 2, 16, 8, 16
ORDER = ("query", "key", "value", "past_state", "decay", "beta")
MICROSOFT = "com.microsoft"
#: Options of a node: heads of queries, keys and values, which inputs it has, its attributes.
CASES = {
    "gated, with a past state, values share keys, a scale": {"values": 4, "scale": 0.7},
    "no decay, no past state, queries share values, keys shared, one beta": {
        "queries": 4, "keys": 1, "beta": 1, "rule": "delta", "past": False,
    },
    "a decay a channel": {"decay": HEADS * KEY},
}  # fmt: skip


def shapes(
    queries=HEADS, keys=HEADS, values=HEADS, decay=None, beta=None, past=True, rule="gated_delta", **_
):
    found = {"query": queries * KEY, "key": keys * KEY, "value": values * VALUE}
    found |= {"decay": decay or values} if rule == "gated_delta" else {}
    found |= {"beta": beta or values}
    found = {name: ("B", "T", width) for name, width in found.items()}
    return found | ({"past_state": ("B", values, KEY, VALUE)} if past else {})


def node(
    name="attn", prefix="", queries=HEADS, values=HEADS, rule="gated_delta", domain=MICROSOFT, **options
):
    given = shapes(queries=queries, values=values, rule=rule, **options)
    return helper.make_node(
        "LinearAttention",
        [name if name in given else "" for name in ORDER],
        [f"{prefix}output", f"{prefix}present_state"],
        name=name,
        domain=domain,
        q_num_heads=queries,
        kv_num_heads=values,
        update_rule=rule,
        scale=options.get("scale", 0.0),
        **({"state_window": options["window"]} if "window" in options else {}),
    )


def wrap(nodes, domain=MICROSOFT, opset=21, **options):
    def values(names):
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in names.items()
        ]

    results = {name: ("B",) + (None,) * (3 if "state" in name else 2) for n in nodes for name in n.output}
    graph = helper.make_graph(nodes, "graph", values(shapes(**options)), values(results))
    versions = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=versions, ir_version=10)


def data(length, batch=2, seed=0, **options):
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes(**options).items():
        sizes = [{"B": batch, "T": length}.get(size, size) for size in shape]
        x = rng.standard_normal(sizes)
        if name == "key":
            keys = x.reshape(batch, length, -1, KEY)
            x = (keys / np.linalg.norm(keys, axis=-1, keepdims=True)).reshape(sizes)
        if name == "decay":
            x = -0.3 * np.abs(x)
        if name == "beta":
            x = 1 / (1 + np.exp(-x))
        found[name] = x.astype(np.float32)
    return found


def lower(given, values=HEADS, **_):
    """L of a node whose values share keys."""
    k, beta, g = (torch.from_numpy(given[name]) for name in ("key", "beta", "decay"))
    k = k.unflatten(-1, (HEADS, -1)).repeat_interleave(values // HEADS, dim=2)
    k, beta, g = (x.transpose(1, 2).unflatten(2, (-1, CHUNK)) for x in (k, beta, g))
    return from_keys(k, beta, g)


@pytest.fixture(scope="module")
def plan():
    return qinvert.calibrate(lower(data(64 * CHUNK)), bits=8)


def exact_function(name, opset):
    """``(I - L)(I + L^2)(I + L^4) ...``: what a plan approximates, in float32."""
    eye = numpy_helper.from_array(np.eye(CHUNK, dtype=np.float32)[None, None], "eye")
    nodes = [helper.make_node("Constant", [], ["eye"], value=eye)]
    nodes += [helper.make_node("Neg", ["L"], ["power0"]), helper.make_node("Sub", ["eye", "L"], ["t0"])]
    for i in range(3):
        nodes += [
            helper.make_node("MatMul", [f"power{i}"] * 2, [f"power{i + 1}"]),
            helper.make_node("MatMul", [f"t{i}", f"power{i + 1}"], [f"step{i}"]),
            helper.make_node("Add", [f"t{i}", f"step{i}"], ["T" if i == 2 else f"t{i + 1}"]),
        ]
    return helper.make_function("qinvert", name, ["L"], ["T"], nodes, [helper.make_opsetid("", opset)])


def with_exact_inverse(model):
    names = [function.name for function in model.functions]
    assert names
    assert all(name.startswith("TriInv_") for name in names)
    exact = onnx.ModelProto()
    exact.CopyFrom(model)
    del exact.functions[:]
    exact.functions.extend(exact_function(name, model.opset_import[0].version) for name in names)
    return exact


def run(model, given):
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, given)


@pytest.fixture(scope="module", params=CASES)
def grafted(request, plan, tmp_path_factory):
    options = CASES[request.param]
    folder = tmp_path_factory.mktemp("graft")
    before = wrap([node(**options)], **options)
    onnx.save(before, folder / "in.onnx")
    after = qinvert.graft(folder / "in.onnx", plan, folder / "out.onnx")
    assert (folder / "out.onnx").read_bytes() == after.SerializeToString(deterministic=True)
    return options, before, after


def test_with_an_exact_inverse_outputs_and_state_are_those_of_onnxruntimes_kernel(grafted):
    options, before, after = grafted
    exact = with_exact_inverse(after)
    for length in LENGTHS:
        given = data(length, seed=length, **options)
        for actual, expected in zip(run(exact, given), run(before, given), strict=True):
            assert actual.shape == expected.shape
            assert np.abs(actual - expected).max() < 1e-5


def test_with_the_plan_outputs_and_state_are_within_its_error(plan, grafted):
    options, before, after = grafted
    if options != next(iter(CASES.values())):
        return  # L of the other cases is not built here
    given = data(4 * CHUNK, seed=5, **options)
    matrices = lower(given, **options)
    statistics = ErrorStatistics()
    statistics.update(plan.layer().inverse(matrices), qinvert.exact_inverse(matrices))
    # An error of T passes through products with T's right-hand sides, no more.
    worst = 3 * 10 ** (-statistics.sqnr_db / 20)
    for actual, wanted in zip(run(after, given), run(before, given), strict=True):
        assert 0 < np.linalg.norm(actual - wanted) < worst * np.linalg.norm(wanted)


@pytest.fixture(scope="module")
def chained(plan, tmp_path_factory):
    """Two nodes, the second of which reads values that the first one wrote."""
    folder = tmp_path_factory.mktemp("chained")
    second = node("second", "second_", rule="delta", past=False)
    # This rule ignores the decay.
    for i, name in ((0, "query"), (1, "key"), (2, "value_again"), (4, "decay"), (5, "beta")):
        second.input[i] = name
    first = node("first")
    first.input[0] = "query"
    model = wrap([first, helper.make_node("Identity", ["output"], ["value_again"]), second])
    onnx.save(model, folder / "in.onnx")
    plan.save(folder / "plan.json")
    return folder, model


def test_nodes_and_layers_go_together_by_name(plan, chained):
    folder, before = chained
    files = [str(folder / name) for name in ("in.onnx", "plan.json", "out.onnx")]
    arguments = ["graft", *files[:2], "-o", files[2], "--layer", "second=layer", "--json"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["functions"] == ["TriInv_layer"]
    after = onnx.load(files[2])
    kinds = [n.op_type for n in after.graph.node]
    assert (kinds.count("LinearAttention"), kinds.count("TriInv_layer")) == (1, 1)
    given = data(40)
    for actual, expected in zip(run(with_exact_inverse(after), given), run(before, given), strict=True):
        assert np.abs(actual - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("layers", "message"), [({"third": "layer"}, "no node 'third'"), ({"first": "other"}, "no layer 'other'")]
)
def test_names_that_are_not_there_are_refused(plan, chained, layers, message):
    folder, _ = chained
    with pytest.raises(PlanError, match=message):
        qinvert.graft(folder / "in.onnx", plan, folder / "x.onnx", layers=layers)
    assert not (folder / "x.onnx").exists()


def test_another_number_of_layers_is_refused(plan, chained):
    folder, _ = chained
    three = replace(plan, layers={str(i): plan.layer() for i in range(3)})
    with pytest.raises(PlanError, match=r"2 nodes .* 3 layers"):
        qinvert.graft(folder / "in.onnx", three, folder / "x.onnx")


@pytest.mark.parametrize(
    ("options", "opset", "message"),
    [
        ({"rule": "gated"}, 21, "no LinearAttention node"),
        ({"window": 2}, 21, "window of states"),
        ({"lacking": 4}, 21, "no input decay"),
        ({"lacking": 5}, 21, "no input beta"),
        ({"beta": 3}, 21, "do not fit"),
        ({}, 17, "operator set 17"),
    ],
)
def test_what_cannot_be_grafted_is_refused(plan, tmp_path, options, opset, message):
    model = wrap([node(**options)], opset=opset, **options)
    if "lacking" in options:
        model.graph.node[0].input[options["lacking"]] = ""
    onnx.save(model, tmp_path / "in.onnx")
    with pytest.raises(ExportError, match=message):
        qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_file_that_is_no_model_is_refused(plan, tmp_path):
    (tmp_path / "in.onnx").write_bytes(b"\x00not a model")
    with pytest.raises(ExportError, match="not a complete ONNX model"):
        qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "out.onnx")


def test_the_standard_operator_is_grafted_too(plan, tmp_path):
    before = wrap([node(domain="")], domain="", opset=27)
    onnx.save(before, tmp_path / "in.onnx")
    after = qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "out.onnx")
    assert "LinearAttention" not in {n.op_type for n in after.graph.node}
    given = data(20, batch=1)
    exact = with_exact_inverse(after)
    for actual, expected in zip(
        ReferenceEvaluator(exact).run(None, given), ReferenceEvaluator(before).run(None, given), strict=True
    ):
        assert np.abs(actual - expected).max() < 1e-5


def test_nodes_and_layers_go_together_by_number(plan, tmp_path):
    nodes = [node(f"layer_{i}", f"{i}_") for i in range(11)]
    for one in nodes:
        for i, name in enumerate(ORDER):
            one.input[i] = name
    found = find_nodes(wrap(nodes))
    as_text = sorted(f"layers.{i}" for i in range(11))
    assert as_text[2] == "layers.10"
    assigned = _assigned(found, replace(plan, layers=dict.fromkeys(as_text, plan.layer())), None)
    assert assigned == {f"layer_{i}": f"layers.{i}" for i in range(11)}


def test_nodes_that_are_alike_may_have_a_whole_layer_and_one_of_heads(plan, tmp_path):
    nodes = [node(f"layer_{i}", f"{i}_") for i in range(2)]
    for one in nodes:
        for i, name in enumerate(ORDER):
            one.input[i] = name
    before = wrap(nodes)
    onnx.save(before, tmp_path / "in.onnx")
    entries = ["layers.0", "layers.1/head_0", "layers.1/head_1"]
    mixed = replace(plan, layers=dict.fromkeys(entries, plan.layer()))
    after = qinvert.graft(tmp_path / "in.onnx", mixed, tmp_path / "out.onnx")
    assert [f.name for f in after.functions if f.name.startswith("TriInv")] == [
        "TriInv_layers_0", "TriInv_layers_1_head_0", "TriInv_layers_1_head_1",
    ]  # fmt: skip
    given = data(40)
    for actual, expected in zip(run(with_exact_inverse(after), given), run(before, given), strict=True):
        assert np.abs(actual - expected).max() < 1e-5


def test_a_second_graft_leaves_the_functions_of_the_first(plan, tmp_path):
    second = node("second", "second_")
    before = wrap([node("first"), second])
    onnx.save(before, tmp_path / "in.onnx")
    coarse = qinvert.calibrate(lower(data(64 * CHUNK)), method=qinvert.neumann(CHUNK, 1), min_sqnr_db=0)
    first = qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "1.onnx", layers={"first": "layer"})
    both = qinvert.graft(tmp_path / "1.onnx", coarse, tmp_path / "2.onnx", layers={"second": "layer"})
    assert [function.name for function in first.functions] == ["TriInv_layer"]
    assert len({function.name for function in both.functions}) == 2
    assert "LinearAttention" not in {n.op_type for n in both.graph.node}
    given = data(40)
    # What the first node returns depends on the first plan alone.
    once, twice = run(first, given), run(both, given)
    assert all(np.array_equal(a, b) for a, b in zip(once[:2], twice[:2], strict=True))
    assert not np.allclose(twice[0], twice[2], atol=1e-3)
    exact = zip(run(with_exact_inverse(both), given), run(before, given), strict=True)
    assert all(np.abs(actual - expected).max() < 1e-5 for actual, expected in exact)


def branched(inner):
    """A model with the node in the main graph, and another in a branch."""
    model = wrap([node()])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inner.output]
    branch = helper.make_graph([inner], "branch", [], outputs)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    model.graph.node.append(
        helper.make_node("If", ["always"], ["x", "y"], name="choice", then_branch=branch, else_branch=branch)
    )
    return model


def test_nodes_in_branches_are_refused_not_passed_over(plan, tmp_path):
    onnx.save(branched(node("inner", "inner_")), tmp_path / "in.onnx")
    with pytest.raises(ExportError, match=r"'inner' lies in \w+_branch of If 'choice', .*layers="):
        qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    after = qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "out.onnx", layers={"attn": "layer"})
    assert "LinearAttention" not in {n.op_type for n in after.graph.node}
    onnx.save(branched(node("inner", "inner_", rule="gated")), tmp_path / "other.onnx")
    qinvert.graft(tmp_path / "other.onnx", plan, tmp_path / "out.onnx")


def test_nodes_in_local_functions_are_refused(plan, tmp_path):
    model = wrap([node()])
    function = helper.make_function(
        "local",
        "Block",
        list(ORDER),
        ["inner_output", "inner_present_state"],
        [node("inner", "inner_")],
        [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)],
    )
    model.functions.append(function)
    onnx.save(model, tmp_path / "in.onnx")
    with pytest.raises(ExportError, match="'inner' lies in function 'Block'"):
        qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "out.onnx")


def test_large_weights_do_not_pass_the_inliner(plan, tmp_path, monkeypatch):
    """Beside the node a product by weights, which must come back as they were."""
    weights = np.random.default_rng(0).standard_normal((HEADS * KEY, HEADS * KEY)).astype(np.float32)
    model = wrap([node()])
    model.graph.initializer.append(numpy_helper.from_array(weights, "weights"))
    model.graph.node.insert(0, helper.make_node("MatMul", ["query", "weights"], ["turned"], name="turn"))
    model.graph.node[1].input[0] = "turned"
    model.graph.value_info.append(
        helper.make_tensor_value_info("turned", TensorProto.FLOAT, ("B", "T", HEADS * KEY))
    )
    onnx.save(model, tmp_path / "in.onnx")
    held, inline = [], onnx.inliner.inline_selected_functions

    def measured(given, *arguments, **options):
        held.append([tensor.name for tensor in given.graph.initializer if tensor.HasField("raw_data")])
        return inline(given, *arguments, **options)

    monkeypatch.setattr(onnx.inliner, "inline_selected_functions", measured)
    monkeypatch.setattr("qinvert.export.light_models.MAX_ELEMENTS", 512)
    after = qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "out.onnx")
    (stored,) = [tensor for tensor in after.graph.initializer if tensor.name == "weights"]
    assert np.array_equal(numpy_helper.to_array(stored), weights)
    assert held == [[]]
    given = data(40)
    outputs = [
        onnxruntime.InferenceSession(str(tmp_path / name)).run(None, given)[0]
        for name in ("in.onnx", "out.onnx")
    ]
    statistics = ErrorStatistics()
    statistics.update(torch.from_numpy(outputs[1]), torch.from_numpy(outputs[0]))
    assert statistics.sqnr_db > 20


def test_a_trace_of_fixed_sizes_leaves_nothing_to_the_next(plan, tmp_path):
    model = wrap([node()])
    onnx.save(model, tmp_path / "in.onnx")
    (found,) = find_nodes(model).values()
    fixed = ChunkedNode(found, CHUNK, lambda chunks: chunks.lower)
    before = qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "out.onnx")
    trace(fixed.eval(), found.example(2, 5 * CHUNK), 21)
    after = qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "out.onnx")
    assert after.SerializeToString(deterministic=True) == before.SerializeToString(deterministic=True)
