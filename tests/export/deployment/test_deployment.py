"""Deployed folders on onnxruntime: files, states, tokens, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from deployments import CACHE, TOKENS
from tiny_models import HIDDEN, VOCABULARY, build, of_layers

import qinvert
from qinvert import InputError, Plan, PlanError, VerificationError
from qinvert.export.deployment.deployment import windows
from qinvert.export.deployment.graphs import FORBIDDEN, MAX_RANK, window_graph
from qinvert.export.deployment.step_calls import RecordedSteps, layer_steps
from qinvert.export.deployment.verify_deployment import verify_deployment
from qinvert.export.deployment.window import Window, windowed
from qinvert.export.exporting import profile_for, serialize

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
serialize_model = pytest.importorskip("onnx_ir.serde").serialize_model
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def deployed(tiny):
    return tiny.model, tiny.plan, tiny.folder


def test_the_folder_is_whole(deployed):
    _, plan, folder = deployed
    assert sorted(path.name for path in folder.iterdir()) == [
        "decode.aimet.json",
        "decode.onnx",
        "decode.onnxruntime.json",
        "manifest.json",
        "plan.json",
        "prefill.aimet.json",
        "prefill.onnx",
        "prefill.onnxruntime.json",
    ]
    assert Plan.load(folder / "plan.json") == plan
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert (manifest["chunk"], manifest["window"], manifest["cache"]) == (64, 64, CACHE)
    assert manifest["plan_sha256"] == plan.sha256


@pytest.mark.parametrize("name", ["prefill.onnx", "decode.onnx"])
def test_graphs_hold_what_compilers_take(deployed, name):
    model = onnx.load(deployed[2] / name)
    onnx.checker.check_model(model, full_check=True)
    assert not {node.op_type for node in model.graph.node} & FORBIDDEN
    assert {node.domain for node in model.graph.node} == {""}
    assert len(model.functions) == 0
    shapes = {v.name: v.type.tensor_type.shape.dim for v in (*model.graph.value_info, *model.graph.output)}
    written = [output for node in model.graph.node for output in node.output]
    assert set(written) <= set(shapes)
    for dims in shapes.values():
        assert len(dims) <= MAX_RANK
        assert all(dim.dim_value > 0 or dim.HasField("dim_value") for dim in dims)


def test_both_graphs_have_the_same_states(deployed):
    manifest = json.loads((deployed[2] / "manifest.json").read_bytes())
    states = {state["name"]: state["shape"] for state in manifest["states"]}
    kinds = [state["kind"] for state in manifest["states"]]
    assert sorted(kinds) == ["convolution", "keys", "position", "recurrent", "values", "visible"]
    for graph in manifest["graphs"].values():
        inputs = {value["name"]: value["shape"] for value in graph["inputs"]}
        outputs = {value["name"]: value["shape"] for value in graph["outputs"]}
        for name, shape in states.items():
            assert inputs[name] == outputs[f"{name}_out"] == shape


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17])
def test_windows_hold_every_token_once_in_order(length):
    ids = np.arange(1, length + 1)
    found = list(windows(ids, 8))
    assert [number for number, _ in found] == [8] * (length // 8) + [length % 8] * (length % 8 > 0)
    kept = [feed["input_ids"][feed["valid"] == 1] for _, feed in found]
    assert np.array_equal(np.concatenate(kept), ids)
    for number, feed in found:
        assert feed["input_ids"].shape == feed["valid"].shape == (1, 8)
        # Tokens stand first, and padding is token 0, which every vocabulary has.
        assert not feed["input_ids"][0, number:].any()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
def test_prefill_in_windows_is_the_patched_model(deployed, length):
    model, plan, folder = deployed
    tokens = TOKENS[:, :length]
    with qinvert.patched(model, plan), torch.no_grad():
        wanted = model(tokens).logits[0]
    found = torch.from_numpy(qinvert.Deployment(folder, threads=1).prefill(tokens[0].numpy()))
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) < 5e-3 * float(wanted.norm())


def test_decoding_goes_on_from_prefill(deployed):
    model, plan, folder = deployed
    with qinvert.patched(model, plan), torch.no_grad():
        wanted = model(TOKENS[:, :70]).logits[0, 66:]
    deployment = qinvert.Deployment(folder, threads=1)
    deployment.prefill(TOKENS[0, :66].numpy())
    found = torch.tensor(np.stack([deployment.decode(int(token)) for token in TOKENS[0, 66:70]]))
    assert float((found - wanted).norm()) < 0.05 * float(wanted.norm())
    deployment.reset()
    assert not any(state.any() for state in deployment.states.values())


def test_generation_is_prefill_and_then_the_most_likely_tokens(deployed):
    deployment = qinvert.Deployment(deployed[2], threads=1)
    found = deployment.generate(TOKENS[0, :66].numpy(), 5)
    assert len(found) == 5
    deployment.reset()
    logits = deployment.prefill(TOKENS[0, :66].numpy())[-1]
    for token in found:
        assert token == int(logits.argmax())
        logits = deployment.decode(token)


def test_verification_runs_both_graphs(deployed):
    model, _, folder = deployed
    checks = verify_deployment(folder, model, TOKENS[0].numpy(), lengths=(1, 65))
    assert [(c.prefilled, c.decoded, c.optimized) for c in checks] == [
        (1, 0, False),
        (65, 32, False),
        (1, 0, True),
        (65, 32, True),
    ]
    for check in checks:
        assert max(check.logits, check.states) < 0.02
        assert check.kl < 1e-4
        assert check.top1_agreement > 0.9
        assert check.decode_kl is None if check.decoded == 0 else check.decode_kl < 1e-4


def test_verification_sees_values_that_leave_the_grids_of_decoding(deployed, tmp_path):
    """Graphs and plan then agree, but both are far from the model."""
    model, plan, _ = deployed
    layers = {}
    for name, layer in plan.layers.items():
        short = {n: replace(layer.tensors[n], scale=layer.tensors[n].scale / 1024) for n in carrying(layer)}
        layers[name] = replace(layer, tensors={**layer.tensors, **short})
    qinvert.deploy(model, replace(plan, layers=layers), tmp_path / "out", cache=CACHE)
    check = verify_deployment(tmp_path / "out", model, TOKENS[0].numpy(), lengths=(1,))[0]
    assert check.kl < 1e-4
    assert check.decode_kl > 1e-3


def carrying(layer):
    """Tensors of a layer that hold values or a state."""
    return layer.program.depends_on("v", "state")


@pytest.mark.parametrize("name", ["prefill.onnx", "decode.onnx"])
def test_verification_sees_another_constant(deployed, tmp_path, name):
    model, _, folder = deployed
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    graph = onnx.load(folder / name)
    weights = next(tensor for tensor in graph.graph.initializer if tensor.dims == [VOCABULARY, HIDDEN])
    weights.raw_data = (1.2 * np.frombuffer(weights.raw_data, np.float32)).astype(np.float32).tobytes()
    onnx.save(graph, tmp_path / name)
    with pytest.raises(VerificationError, match="differs"):
        verify_deployment(tmp_path, model, TOKENS[0].numpy(), lengths=(1,))
    other = build("qwen3_5", **of_layers("linear_attention", "full_attention"), intermediate_size=48)
    with pytest.raises(PlanError, match="another model"):
        verify_deployment(tmp_path, other, lengths=(1,))


def test_what_a_deployment_refuses(deployed):
    deployment = qinvert.Deployment(deployed[2], threads=1)
    with pytest.raises(InputError, match="vocabulary has 64"):
        deployment.prefill([64])
    with pytest.raises(InputError, match="at least one"):
        deployment.prefill([])
    with pytest.raises(InputError, match="larger cache"):
        deployment.prefill(np.zeros(64 * 6, np.int64))
    # One window more than the cache fits: a window also sees itself.
    deployment.prefill(np.zeros(64 * 5, np.int64))
    with pytest.raises(InputError, match="larger cache"):
        deployment.decode(0)


def test_other_folders_are_left_alone(deployed, tmp_path):
    model, plan, _ = deployed
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="other files"):
        qinvert.deploy(model, plan, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match="cannot read"):
        qinvert.Deployment(tmp_path)


def test_an_interrupted_deploy_leaves_the_folder_as_it_was(deployed, monkeypatch):
    model, plan, folder = deployed
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("qinvert.export.deployment.deploy.build_graphs", stop)
    with pytest.raises(KeyboardInterrupt):
        qinvert.deploy(model, plan, folder)
    monkeypatch.setattr("qinvert.export.deployment.deploy.build_graphs", lambda *_: [])
    monkeypatch.setattr("qinvert.export.deployment.deploy.manifest_of", lambda *_: None)
    monkeypatch.setattr(Plan, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        qinvert.deploy(model, plan, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"version": 9}'])
def test_damaged_manifests_are_refused(tmp_path, damage):
    (tmp_path / "manifest.json").write_bytes(damage)
    with pytest.raises(InputError, match="deploy"):
        qinvert.Deployment(tmp_path)


def test_a_second_trace_gives_the_same_bytes_under_autocast_too(tiny):
    window = Window(tiny.model, layer_steps(tiny.plan, None, None), RecordedSteps(tiny.plan), CACHE)
    with torch.autocast("cpu", torch.bfloat16), windowed(window, CACHE + 64):
        window.probe(1)
        graph = window_graph(window, tiny.plan, profile_for(tiny.plan, None), 1, masked=False)
    assert serialize(serialize_model(graph)) == (tiny.folder / "decode.onnx").read_bytes()


@pytest.mark.parametrize("weights", ["none", "w4"])
def test_the_same_input_gives_the_same_bytes(tiny, tmp_path, weights):
    for name in ("one", "other"):
        tiny.deploy(tmp_path / name, weights=weights, **({} if weights == "none" else {"data": TOKENS}))
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "other")
    )
    assert first == second


@pytest.mark.parametrize("weights", ["none", "w8"])
def test_weights_lie_beside_graphs_that_are_large(tiny, tmp_path, monkeypatch, weights):
    monkeypatch.setattr("qinvert.export.deployment.deploy.MAX_BYTES", 2**12)
    tiny.deploy(tmp_path / "out", weights=weights, **({} if weights == "none" else {"data": TOKENS}))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    graphs = ["decode.onnx", "decode.onnx.data", "prefill.onnx", "prefill.onnx.data"]
    assert names == sorted([*graphs, "manifest.json", "plan.json"])
    for name in graphs[::2]:
        model = onnx.load(tmp_path / "out" / name, load_external_data=False)
        assert {entry.value for x in model.graph.initializer for entry in x.external_data[:1]} == {
            f"{name}.data"
        }
    # The folder moves with its weights.
    (tmp_path / "out").rename(tmp_path / "moved")
    checks = verify_deployment(tmp_path / "moved", tiny.model, TOKENS[0].numpy(), lengths=(65,))
    assert max(check.logits for check in checks) < 0.02
