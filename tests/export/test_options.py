"""Graphs from keys, graphs that return integers, and models with a function per layer."""

from functools import cache

import numpy as np
import onnx
import onnx.inliner
import onnx.utils
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qinvert
from qinvert.errors import ExportError, InputError, PlanError, VerificationError
from qinvert.execution.simulator import simulate_integers
from qinvert.export import functions, lint
from qinvert.export.exporting import build, serialize
from qinvert.export.functions import function_names, layer_function
from qinvert.export.interface import Interface
from qinvert.export.lowering import keys
from qinvert.export.reading import inlined
from qinvert.profiles import PROFILES
from qinvert.program.steps import MIN_BETA
from qinvert.stress import from_keys, stress_keys, stress_matrices
from qinvert.systems import Systems

BITS = {"npu-qdq-int4": 4, "npu-qdq-int16": 16}
#: Every profile is exact under these, and int16 where sums stay below 2^24 steps, as they do here.
SCALES = "pow2"
SHARE = dict.fromkeys(PROFILES, 0.0)
SIZE = 24


@cache
def keyed(chunk, size=SIZE):
    given = stress_keys(4, chunk, size)
    # Padded tokens, and a beta that is smaller than what a factored plan divides by.
    given["beta"][0], given["beta"][1, chunk // 2 :], given["beta"][2, 1] = 0, 0, MIN_BETA / 2
    return given


@cache
def planned(profile, chunk=16, factored=False, method="auto"):
    k, beta, g = keyed(chunk).values()
    source = (from_keys(k, beta, g), beta)
    options = {"bits": BITS.get(profile, 8), "factored": factored, "method": method, "scales": SCALES}
    return qinvert.calibrate(source, target=profile, min_sqnr_db=0, **options)


def session(model, level="ORT_ENABLE_ALL"):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(serialize(model), options, providers=["CPUExecutionProvider"])


def feed(given):
    return {name: (x if name == "k" else x.unsqueeze(-1))[None].numpy() for name, x in given.items()}


def metadata(model):
    return {entry.key: entry.value for entry in model.metadata_props}


def wrong_share(actual, expected):
    return np.count_nonzero(actual != expected) / expected.size


def built(model, given):
    """L as onnxruntime builds it from keys."""
    part = onnx.utils.Extractor(model).extract_model(["k", "beta", "g"], [keys.FROM_KEYS])
    (found,) = session(part).run(None, feed(given))
    return torch.tril(-torch.from_numpy(found[0]), -1)


@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_l_from_keys_is_right_in_float32(chunk):
    given = keyed(chunk)
    found = built(build(planned("int-ops", chunk), batch=16, input="keys", key_size=SIZE), given)
    exact = from_keys(*(x.double() for x in given.values()))
    assert (found - exact).abs().max() < 2e-6
    # Closer than a difference of cumulated sums comes, and without an overflow.
    assert (found - exact).abs().max() <= (from_keys(*given.values()) - exact).abs().max() + 1e-7


@settings(max_examples=25, deadline=None)
@given(
    profile=st.sampled_from(sorted(PROFILES)),
    chunk=st.sampled_from([16, 32, 64]),
    factored=st.booleans(),
    output=st.sampled_from(["T", "integers"]),
)
def test_graphs_from_keys_equal_the_simulator_given_the_l_that_they_build(profile, chunk, factored, output):
    plan, data = planned(profile, chunk, factored), keyed(chunk)
    model = build(plan, batch=16, chains=1, input="keys", key_size=SIZE, output=output)
    assert lint(model) == []
    (actual,) = session(model).run(None, feed(data))
    layer, lower = plan.layer(), built(model, data)
    if output == "T":
        expected = layer.inverse(lower, data["beta"]).numpy()
    else:
        integers = simulate_integers(
            layer, Systems(lower=lower, beta=data["beta"] if factored else None)
        ).numpy()
        expected = integers + int(metadata(model)["qinvert.output_zero_point"])
    assert wrong_share(actual[0], expected) <= SHARE[profile]
    step = 1 if output == "integers" else layer.output.scale * (2 if factored else 1)
    assert np.abs(actual[0].astype(np.float64) - expected).max() < 8.5 * step


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("profile", PROFILES)
def test_integers_their_scale_and_their_meaning_give_t(profile, factored):
    plan, (k, beta, g) = planned(profile, 16, factored), keyed(16).values()
    lower = from_keys(k, beta, g)
    inputs = {"L": lower[None].numpy()} | ({"beta": beta[None, ..., None].numpy()} if factored else {})
    (t,) = session(build(plan, batch=16)).run(None, inputs)
    model = build(plan, batch=16, output="integers")
    assert lint(model) == []
    (value,), found = model.graph.output, metadata(model)
    assert value.name == ("W" if factored else "S")
    assert ("max(beta, 2^-14)" in found["qinvert.output_meaning"]) == factored
    (integers,) = session(model).run(None, inputs)
    fmt = PROFILES[profile].storage_of(plan.layer().output.format)
    assert integers.dtype.name == fmt.element
    real = integers.astype(np.float32) - np.float32(found["qinvert.output_zero_point"])
    real *= np.float32(found["qinvert.output_scale"])
    if factored:
        real *= np.maximum(beta.numpy(), np.float32(MIN_BETA))[None, ..., None]
    assert np.array_equal(real + np.eye(16, dtype=np.float32), t)


def test_products_with_the_integers_are_products_with_t():
    plan, lower = planned("int-ops"), stress_matrices("correlated_keys", 8, 16)
    model = build(plan, output="integers")
    (s,) = session(model).run(None, {"L": lower[None].numpy()})
    v = np.random.default_rng(0).integers(-127, 128, (8, 16, 5))
    scale = float(metadata(model)["qinvert.output_scale"])
    expected = plan.layer().inverse(lower).double().numpy() @ v
    assert np.allclose(v + scale * (s[0].astype(np.int64) @ v), expected, atol=1e-4)


def test_a_layer_without_steps_returns_integers_too():
    lower = torch.tensor([[[0.0, 0.0], [0.5, 0.0]]])
    plan = qinvert.calibrate(lower)
    (s,) = session(build(plan, batch=1, output="integers")).run(None, {"L": lower[None].numpy()})
    assert np.array_equal(s[0], simulate_integers(plan.layer(), Systems(lower=lower)).numpy())


@pytest.mark.parametrize("profile", PROFILES)
def test_no_node_is_left_unread(profile):
    for output in ("T", "integers"):
        graph = build(planned(profile), output=output).graph
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        assert all(set(node.output) <= read for node in graph.node)


LAYERS = {
    "model.layers.0.linear_attn": stress_matrices("correlated_keys", 8, 32),
    "model.layers.1.linear_attn": stress_matrices("independent_keys", 8, 32),
}
METHODS = {
    "packed": qinvert.block_merge(32, base=4, corrections=1),
    "masked": qinvert.block_merge(32, base=2, layout="masked"),
    "tiled": qinvert.block_merge(32, base=1, tile=16),
}


@cache
def many(profile, method="packed"):
    options = {"bits": BITS.get(profile, 8), "scales": SCALES, "min_sqnr_db": 0}
    return qinvert.calibrate(LAYERS, target=profile, method=METHODS[method], **options)


def differing(plan, model, count, level="ORT_ENABLE_ALL"):
    """Largest share of a layer's values that differ from its simulation."""
    found = session(model, level).run(None, {f"{n}/L": x[None, :count].numpy() for n, x in LAYERS.items()})
    return max(
        wrong_share(actual[0], plan.layers[name].inverse(lower[:count]).numpy())
        for actual, (name, lower) in zip(found, LAYERS.items(), strict=True)
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_one_model_has_a_function_for_each_layer(profile, tmp_path):
    plan = many(profile)
    model = qinvert.export_layers(plan, tmp_path / "all.onnx", batch=8, chains=1)
    assert onnx.load(tmp_path / "all.onnx") == model
    onnx.checker.check_model(model, full_check=True)
    assert [(node.op_type, node.name) for node in model.graph.node] == [
        ("TriInv_model_layers_0_linear_attn", "model.layers.0.linear_attn"),
        ("TriInv_model_layers_1_linear_attn", "model.layers.1.linear_attn"),
    ]
    # Two functions round in their own places: inlined or not, each is its layer's simulation.
    plain = onnx.inliner.inline_local_functions(model)
    assert lint(plain) == lint(model) == lint(tmp_path / "all.onnx") == []
    for candidate in (model, plain):
        assert differing(plan, candidate, 8) <= SHARE[profile]
    for name, lower in LAYERS.items():
        results = qinvert.verify(tmp_path / "all.onnx", plan, lower, layer=name)
        assert all(r.mismatches <= SHARE[profile] * r.values for r in results)


def test_bodies_of_functions_read_like_graphs(tmp_path):
    plan = many("npu-qdq-int8")
    model = qinvert.export_layers(plan, tmp_path / "all.onnx")
    (name, *_), function = LAYERS, model.functions[0]
    graph = build(plan, layer=name).graph
    nodes = [node for node in function.node if node.op_type != "Constant"]
    assert nodes == list(graph.node)
    constants = {node.output[0] for node in function.node if node.op_type == "Constant"}
    assert constants == {tensor.name for tensor in graph.initializer}
    assert list(function.value_info) == list(graph.value_info)
    assert metadata(function)["qinvert.layer"] == name
    assert (list(function.input), list(function.output), function.domain) == (["L"], ["T"], "qinvert")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("profile", PROFILES)
def test_an_open_batch_takes_any_number_of_matrices(profile, method):
    plan = many(profile, method)
    model = functions.build_layers(plan, batch=None)
    sizes = {value.name: value.type.tensor_type.shape.dim[1].dim_param for value in model.graph.input}
    assert set(sizes.values()) == {"batch"}
    for count in (1, 3, 8):
        assert differing(plan, model, count) <= SHARE[profile]
    assert differing(plan, model, 8, "ORT_DISABLE_ALL") <= SHARE[profile]


@pytest.mark.parametrize("batch", [16, None])
def test_functions_take_keys_and_return_integers(batch):
    plan, data = planned("npu-qdq-int8", 16, factored=True), keyed(16)
    options = {"input": "keys", "key_size": SIZE, "output": "integers"}
    model = functions.build_layers(plan, batch=batch, **options)
    (found,) = session(model).run(None, {f"layer/{name}": x for name, x in feed(data).items()})
    (single,) = session(build(plan, batch=16, **options)).run(None, feed(data))
    assert np.array_equal(found, single)


def test_the_function_of_a_layer_can_be_called_by_any_model():
    plan = many("npu-qdq-int8")
    name, lower = next(iter(LAYERS.items()))
    interface = Interface(batch=None)
    function = layer_function(
        plan.layers[name], PROFILES["npu-qdq-int8"], interface, name="TriInv_0", layer=name
    )
    value = [onnx.helper.make_tensor_value_info(n, 1, [1, "n", 32, 32]) for n in ("a/L", "attention/T")]
    call = onnx.helper.make_node("TriInv_0", ["a/L"], ["attention/T"], domain="qinvert")
    model = onnx.helper.make_model(
        onnx.helper.make_graph([call], "decoder", value[:1], value[1:]),
        functions=[function],
        opset_imports=[onnx.helper.make_opsetid("", 19), onnx.helper.make_opsetid("qinvert", 1)],
        ir_version=10,
    )
    (found,) = session(model).run(None, {"a/L": lower[None, :5].numpy()})
    assert np.array_equal(found[0], plan.layers[name].inverse(lower[:5]).numpy())


def test_equal_arguments_give_equal_bytes(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        qinvert.export_layers(many("int-ops"), tmp_path / name, batch=2)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_layers_are_written_in_the_given_order_under_names_of_their_own(tmp_path):
    chosen = list(reversed(LAYERS))
    model = qinvert.export_layers(many("int-ops"), tmp_path / "all.onnx", layers=chosen)
    assert [node.name for node in model.graph.node] == chosen
    names = function_names(["a.b", "a_b", "a/b", "é", "a_b_1"])
    assert len(set(names.values())) == 5
    assert all(name.isidentifier() and name.isascii() for name in names.values())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"input": "keys"}, ExportError, "key_size None"),
        ({"input": "keys", "key_size": 0}, ExportError, "key_size 0"),
        ({"key_size": 8}, ExportError, "for input='keys' only"),
        ({"output": "S"}, ExportError, "output 'S' is unknown; use T, integers or ports"),
        ({"input": "L", "output": None}, ExportError, "output None"),
        ({"batch": None}, ExportError, "export_layers only"),
    ],
)
def test_illegal_options_are_refused_and_leave_no_file(arguments, error, words, tmp_path):
    with pytest.raises(error, match=words):
        qinvert.export(planned("int-ops"), tmp_path / "t.onnx", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_illegal_layers_are_refused(tmp_path):
    plan = many("int-ops")
    for chosen, error, words in (
        (["x"], PlanError, "unknown layer 'x'"),
        ([], ExportError, "are empty or name one twice"),
        (list(LAYERS) * 2, ExportError, "name one twice"),
    ):
        with pytest.raises(error, match=words):
            qinvert.export_layers(plan, tmp_path / "t.onnx", layers=chosen)
    assert list(tmp_path.iterdir()) == []


def test_two_planes_cannot_be_one_output():
    plan = qinvert.calibrate(stress_matrices("ones", 4, 16), target="int-ops", bits="8x2")
    with pytest.raises(ExportError, match="int8x2 with 2 planes; leave output out"):
        build(plan, output="integers")


@pytest.fixture
def from_keys_file(tmp_path):
    plan = planned("int-ops")
    qinvert.export(plan, tmp_path / "k.onnx", input="keys", key_size=SIZE, batch=3)
    return tmp_path / "k.onnx", plan


def test_verify_runs_graphs_from_keys(from_keys_file):
    path, plan = from_keys_file
    for result in qinvert.verify(path, plan, keyed(16)):
        assert (result.values, result.mismatches, result.exact) == (18 * 256, 0, False)


def without(data, name):
    return {n: x for n, x in data.items() if n != name}


def test_verify_wants_legal_keys(from_keys_file):
    path, plan = from_keys_file
    data = keyed(16)
    for wrong, words in (
        (stress_matrices("ones", 4, 16), "builds L from keys"),
        (without(data, "g"), "builds L from keys"),
        (data | {"k": data["k"][..., 1:]}, "do not fit"),
        (data | {"g": -data["g"]}, "g at most 0"),
        (data | {"beta": 3 + data["beta"]}, "beta in"),
        (data | {"k": data["k"] * float("nan")}, "finite"),
    ):
        with pytest.raises(InputError, match=words):
            qinvert.verify(path, plan, wrong)


@pytest.mark.parametrize("name", ["ones/lower", "ones/strictly_lower", "minus_ones/strictly_lower"])
def test_a_wrong_prologue_is_caught(from_keys_file, name):
    path, plan = from_keys_file
    model = onnx.load(path)
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    changed = onnx.numpy_helper.to_array(tensor).copy()
    changed[..., -1, 1] *= np.float32(0.9)
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed, name))
    onnx.save(model, path)
    with pytest.raises(VerificationError, match="builds L from keys with an error"):
        qinvert.verify(path, plan, keyed(16))


def test_verify_compares_integers(tmp_path):
    plan, lower = planned("npu-qdq-uint8"), stress_matrices("correlated_keys", 8, 16)
    model = qinvert.export(plan, tmp_path / "s.onnx", output="integers")
    qinvert.export(plan, tmp_path / "t.onnx")
    integers, floats = (qinvert.verify(tmp_path / f, plan, lower) for f in ("s.onnx", "t.onnx"))
    assert [(r.mismatches, r.sqnr_db) for r in integers] == [(r.mismatches, r.sqnr_db) for r in floats]
    # One step more everywhere.
    node = next(n for n in model.graph.node if n.output[0] == "S")
    scale = onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == node.input[1]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(scale.reshape(1, 1, 1, 1), "step"))
    added = onnx.helper.make_node("Add", [node.input[0], "step"], ["shifted"], name="shifted")
    node.input[0] = "shifted"
    model.graph.node.insert(list(model.graph.node).index(node), added)
    onnx.save(model, tmp_path / "s.onnx")
    with pytest.raises(VerificationError, match=r"in \d+ of 2048 values, by up to [12] steps"):
        qinvert.verify(tmp_path / "s.onnx", plan, lower)


def test_verify_names_the_layers_of_a_model(tmp_path):
    plan = many("int-ops")
    qinvert.export_layers(plan, tmp_path / "all.onnx", layers=list(LAYERS)[:1])
    with pytest.raises(
        ExportError, match=r"does not call layer .*layers.1.*; it has model.layers.0.linear_attn"
    ):
        qinvert.verify(tmp_path / "all.onnx", plan, LAYERS[list(LAYERS)[1]], layer=list(LAYERS)[1])


def test_a_product_of_m_is_no_prologue():
    model = build(planned("npu-qdq-int8"), input="keys", key_size=SIZE)
    at = next(i for i, node in enumerate(model.graph.node) if node.output[0] == keys.FROM_KEYS)
    reader = model.graph.node[at + 1]
    square = onnx.helper.make_node("MatMul", [keys.FROM_KEYS] * 2, ["square"], name="square")
    reader.input[0] = "square"
    model.graph.node.insert(at + 1, square)
    found = {(finding.node, finding.rule) for finding in lint(model)}
    assert ("square", "quantized") in found
    for profile in ("int-ops", "qlinear"):
        assert ("square", "operators") in {(f.node, f.rule) for f in lint(model, profile)}


def test_floats_in_a_graph_from_l_are_no_prologue():
    model = build(planned("npu-qdq-int8"))
    exp = onnx.helper.make_node("Exp", [model.graph.node[0].output[0]], ["e"], name="e")
    model.graph.node[1].input[0] = "e"
    model.graph.node.insert(1, exp)
    # A chunk step has exponentials too, but quantized ones.
    assert ("e", "quantized") in {(f.node, f.rule) for f in lint(model)}


def test_constants_of_functions_may_not_lie_outside():
    model = functions.build_layers(many("int-ops"))
    node = next(n for n in model.functions[0].node if n.op_type == "Constant")
    tensor = node.attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="passwd")
    assert {finding.rule for finding in lint(model)} == {"self-contained"}


def test_functions_that_call_too_many_functions_are_refused(monkeypatch):
    # Twice at each of 40 levels: 2^40 nodes.
    opset, functions = [onnx.helper.make_opsetid("", 19), onnx.helper.make_opsetid("qinvert", 1)], []
    for level in range(40):
        names = [f"f{level - 1}"] * 2 if level else ["Neg"] * 2
        domain = "qinvert" if level else ""
        body = [
            onnx.helper.make_node(name, [source], [target], domain=domain)
            for name, source, target in zip(names, "xy", "yz", strict=True)
        ]
        functions.append(onnx.helper.make_function("qinvert", f"f{level}", ["x"], ["z"], body, opset))
    value = [onnx.helper.make_tensor_value_info(name, 1, [1, 8, 16, 16]) for name in ("L", "T")]
    call = onnx.helper.make_node("f39", ["L"], ["T"], domain="qinvert", name="layer")
    graph = onnx.helper.make_graph([call], "g", value[:1], value[1:])
    model = onnx.helper.make_model(graph, functions=functions, opset_imports=opset, ir_version=10)
    with pytest.raises(ExportError, match="nodes once it is inlined"):
        inlined(model)
    model.functions[0].node[0].op_type, model.functions[0].node[0].domain = "f39", "qinvert"
    with pytest.raises(ExportError, match="calls itself"):
        inlined(model)
    model.functions[0].node[0].op_type, model.functions[0].node[0].domain = "Neg", ""
    del model.functions[2:]
    model.graph.node[0].op_type = "f1"
    assert [node.op_type for node in inlined(model).graph.node] == ["Neg"] * 4
    del model.functions[1:]
    model.graph.node[0].op_type = "f0"
    assert [node.op_type for node in inlined(model).graph.node] == ["Neg", "Neg"]
    monkeypatch.setattr("qinvert.export.reading.MAX_NODES", 1)
    with pytest.raises(ExportError, match="nodes once it is inlined"):
        inlined(model)
