"""LinearAttention nodes replaced by chunks, against onnxruntime's own kernel."""

import json

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
from qinvert.delta_rule import from_keys
from qinvert.errors import ExportError, PlanError
from qinvert.metrics import ErrorStatistics

pytest.importorskip("onnxscript", reason="pip install 'qinvert[model]'")
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTHS = (1, 63, 64, 65, 200)
HEADS, KEY, VALUE, CHUNK = 2, 16, 8, 64
ORDER = ("query", "key", "value", "past_state", "decay", "beta")
MICROSOFT = "com.microsoft"
"""Options of a node: heads of queries, keys and values, which inputs it has, its attributes."""
CASES = {
    "gated, with a past state": {},
    "values share keys, a scale": {"values": 4, "scale": 0.7},
    "queries share values, one beta": {"queries": 4, "beta": 1},
    "no decay, keys shared, no past state": {"keys": 1, "rule": "delta", "past": False},
    "a decay a channel": {"decay": HEADS * KEY},
}


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


def lower(given):
    """L of a node without sharing."""
    k, beta, g = (torch.from_numpy(given[name]) for name in ("key", "beta", "decay"))
    k, beta, g = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (k, beta, g))
    k, beta, g = (x.unflatten(2, (-1, CHUNK)) for x in (k, beta, g))
    return from_keys(k, beta.squeeze(-1), g.squeeze(-1))


@pytest.fixture(scope="module")
def plan():
    return qinvert.calibrate(lower(data(16 * CHUNK)), bits=8)


def exact_function(name, opset):
    """``(I - L)(I + L^2)(I + L^4) ...``: what a plan approximates, in float32."""
    eye = numpy_helper.from_array(np.eye(CHUNK, dtype=np.float32)[None, None], "eye")
    nodes = [helper.make_node("Constant", [], ["eye"], value=eye)]
    nodes += [helper.make_node("Neg", ["L"], ["power0"]), helper.make_node("Sub", ["eye", "L"], ["t0"])]
    for i in range(5):
        nodes += [
            helper.make_node("MatMul", [f"power{i}"] * 2, [f"power{i + 1}"]),
            helper.make_node("MatMul", [f"t{i}", f"power{i + 1}"], [f"step{i}"]),
            helper.make_node("Add", [f"t{i}", f"step{i}"], ["T" if i == 4 else f"t{i + 1}"]),
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


def test_with_the_plan_outputs_and_state_are_within_its_error(plan, tmp_path):
    before = wrap([node()])
    onnx.save(before, tmp_path / "in.onnx")
    after = qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "out.onnx")
    given = data(4 * CHUNK, seed=5)
    (out, state), (expected, end) = run(after, given), run(before, given)
    matrices = lower(given)
    statistics = ErrorStatistics()
    statistics.update(plan.layer().inverse(matrices), qinvert.exact_inverse(matrices))
    # An error of T passes through products with T's right-hand sides, no more.
    worst = 3 * 10 ** (-statistics.sqnr_db / 20)
    for actual, wanted in ((out, expected), (state, end)):
        assert 0 < np.linalg.norm(actual - wanted) < worst * np.linalg.norm(wanted)


def test_nodes_and_layers_go_together_by_order_or_by_name(plan, tmp_path):
    second = node("second", "second_", rule="delta", past=False)
    nodes = [node("first"), helper.make_node("Identity", ["output"], ["value_again"]), second]
    second.input[2] = "value_again"
    model = wrap(nodes[:1])
    model.graph.node.extend(nodes[1:])
    for name in second.output:
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "in.onnx")
    (tmp_path / "plan.json").write_text(json.dumps(json.loads(plan_text(plan))))
    result = CliRunner().invoke(
        cli,
        [
            "graft",
            *(str(tmp_path / name) for name in ("in.onnx", "plan.json")),
            "-o",
            str(tmp_path / "out.onnx"),
            "--layer",
            "second=layer",
            "--json",
        ],
    )
    assert result.exit_code == 0, result.output
    kinds = [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node]
    assert kinds.count("LinearAttention") == 1
    assert kinds.count("TriInv_layer") == 1
    given = data(100)
    assert len(run(onnx.load(tmp_path / "out.onnx"), given)) == 4
    with pytest.raises(PlanError, match="no node 'third'"):
        qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "x.onnx", layers={"third": "layer"})
    with pytest.raises(PlanError, match="no layer 'other'"):
        qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "x.onnx", layers={"first": "other"})
    assert not (tmp_path / "x.onnx").exists()


def plan_text(plan):
    from qinvert import plan_io

    return plan_io.to_bytes(plan)


@pytest.mark.parametrize(
    ("options", "opset", "message"),
    [
        ({"rule": "gated"}, 21, "no LinearAttention node"),
        ({"window": 2}, 21, "window of states"),
        ({}, 17, "operator set 17"),
    ],
)
def test_what_cannot_be_grafted_is_refused(plan, tmp_path, options, opset, message):
    onnx.save(wrap([node(**options)], opset=opset), tmp_path / "in.onnx")
    with pytest.raises(ExportError, match=message):
        qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_file_that_is_no_model_is_refused(plan, tmp_path):
    (tmp_path / "in.onnx").write_bytes(b"\x00not a model")
    with pytest.raises(ExportError, match="no complete ONNX model"):
        qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "out.onnx")


def test_the_standard_operator_is_grafted_too(plan, tmp_path):
    before = wrap([node(domain="")], domain="", opset=27)
    onnx.save(before, tmp_path / "in.onnx")
    after = qinvert.graft(tmp_path / "in.onnx", plan, tmp_path / "out.onnx")
    assert "LinearAttention" not in {n.op_type for n in after.graph.node}
    given = data(70, batch=1)
    exact = with_exact_inverse(after)
    for actual, expected in zip(
        ReferenceEvaluator(exact).run(None, given), ReferenceEvaluator(before).run(None, given), strict=True
    ):
        assert np.abs(actual - expected).max() < 1e-5
