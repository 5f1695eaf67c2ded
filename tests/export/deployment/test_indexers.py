"""Sparse attention of deployed models: the blocks of the model's own code, in windows and in graphs."""

import numpy as np
import onnx
import pytest
import torch
from deployments import Tiny
from onnx import numpy_helper
from tiny_models import VOCABULARY, build, of_both, of_layers
from windows import CACHE, POSITIONS, WIDE, driven, in_parts, whole

import qinvert
from qinvert import ExportError
from qinvert.export.deployment.deploy import build_graphs
from qinvert.export.deployment.graphs import FORBIDDEN, MAX_RANK
from qinvert.export.deployment.indexers import MASK, indexers
from qinvert.export.deployment.options import DeployOptions
from qinvert.export.deployment.step_calls import SimulatedSteps, layer_steps
from qinvert.export.deployment.verify_deployment import verify_deployment
from qinvert.export.deployment.window import Window, windowed
from qinvert.export.exporting import profile_for

pytest.importorskip("transformers.models.glm5_next", reason="transformers >= 5.16")
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.randint(0, VOCABULARY, (1, 300), generator=torch.Generator().manual_seed(0))
#: What configurations call the tokens that a query takes.
BUDGETS = {"qwen4_exp": "indexer_budget", "glm5_next": "index_topk"}
SPARSE = sorted(BUDGETS)

#: Rounds that make rows and columns of a small matrix sum to 1, which a trace repeats.
FEWER = {"glm5_next": {"hc_sinkhorn_iters": 2}}


def planned(family, **changes):
    model = build(family, **of_both(family) | FEWER.get(family, {}) | changes)
    return model, qinvert.calibrate(model, TOKENS, scope="chunk", **WIDE)


@pytest.fixture(scope="module", params=SPARSE)
def sparse(request):
    """A model that takes 4 blocks of 16 tokens."""
    return request.param, *planned(request.param)


def share(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_windows_choose_the_blocks_of_the_model(sparse, chunks, length):
    _, model, plan = sparse
    tokens = TOKENS[:, :length]
    assert share(driven(model, plan, tokens, chunks)[0], whole(model, plan, tokens)) < 1e-4


def test_one_block_more_is_another_model(sparse):
    family, model, plan = sparse
    wanted = whole(model, plan, TOKENS[:, :200])
    other, _ = planned(family, **{BUDGETS[family]: 80})
    # What the test above would not let pass.
    assert share(driven(other, plan, TOKENS[:, :200], 1)[0], wanted) > 1e-2


@pytest.mark.parametrize("family", SPARSE)
def test_texts_in_parts_have_padding_between_them(family):
    # No delta rule before it, whose state is rounded once more wherever a part ends.
    model, plan = planned(family, layer_types=["full_attention", "linear_attention"])
    (attention,) = (m for n, m in model.named_modules() if n.endswith("layers.0.self_attn"))
    seen = []
    handle = attention.register_forward_hook(lambda _m, _i, out: seen.append(out[0]))
    parts = [(TOKENS[:, :40], 1), (TOKENS[:, 40:110], 1), (TOKENS[:, 110:130], None)]
    _, states = in_parts(model, plan, parts)
    # Each part starts with a probe.
    counts = [0, 40, 0, 64, 6, 0, *[1] * 20]
    found = torch.cat([out[:, :count] for out, count in zip(seen, counts, strict=True)], 1)
    seen.clear()
    whole(model, plan, TOKENS[:, :130])
    handle.remove()
    assert all({"forward", MASK}.isdisjoint(vars(module)) for module in model.modules())
    assert share(found, seen[0]) < 1e-6
    taken = states["visible"][0, 0, 0].bool()
    assert states["entries_16"][taken].tolist() == [position // 16 for position in range(130)]
    assert taken.sum() < CACHE - int(taken.nonzero()[0])


@pytest.mark.parametrize("family", SPARSE)
def test_a_budget_for_all_positions_needs_no_states(family):
    model, plan = planned(family, **{BUDGETS[family]: POSITIONS})
    found, states = driven(model, plan, TOKENS[:, :200], 2)
    assert share(found, whole(model, plan, TOKENS[:, :200])) < 1e-4
    assert not {"blocks_1", "tail_1", "entries_16"} & set(states)


def test_layers_share_what_an_indexer_chose():
    layers = of_layers("linear_attention", "full_attention", "full_attention")
    kinds = {"indexer_types": ["full", "full", "shared"], "mlp_layer_types": ["dense"] * 3}
    model, plan = planned("glm5_next", **layers | kinds)
    assert len([*indexers(model)]) == 1
    found, states = driven(model, plan, TOKENS[:, :200], 1)
    assert share(found, whole(model, plan, TOKENS[:, :200])) < 1e-4
    assert "keys_2" in states
    assert "blocks_2" not in states


NGRAMS = {"ple_layer_ids": [1], "ple_embed_dim": 32, "ngram_vocab_size_base": 100, "eos_token_id": 1}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen4_exp", NGRAMS, "n-grams by a hash"),
        ("glm5_next", {"index_kpool_always_select_tail": False}, "block that is not full"),
    ],
)
def test_what_graphs_cannot_say_is_refused(family, changes, message):
    model, plan = planned(family, **changes)
    window = Window(model, layer_steps(plan, 1, None), SimulatedSteps(), CACHE)
    with pytest.raises(ExportError, match=message), windowed(window, POSITIONS):
        window.probe(64)


def test_indexers_of_another_kind_are_refused(sparse, monkeypatch):
    _, model, plan = sparse
    for kind in ("QWEN", "GLM"):
        monkeypatch.setattr(f"qinvert.export.deployment.indexers.{kind}", ("unknown",))
    window = Window(model, layer_steps(plan, 1, None), SimulatedSteps(), CACHE)
    with windowed(window, POSITIONS), pytest.raises(ExportError, match="of a kind that deploy does not know"):
        window.probe(64)


@pytest.fixture(scope="module")
def graphs(sparse):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, model, plan = sparse
    found = build_graphs(model, plan, profile_for(plan, None), DeployOptions(cache=CACHE))
    return Tiny(model, None, plan, found, None)


def test_graphs_are_the_model(graphs, tmp_path):
    graphs.deploy(tmp_path / "out")
    for name in ("prefill.onnx", "decode.onnx"):
        graph = onnx.load(tmp_path / "out" / name).graph
        assert not {node.op_type for node in graph.node} & FORBIDDEN
        values = (*graph.input, *graph.value_info, *graph.output)
        shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values]
        assert all(len(shape) <= MAX_RANK and all(shape) for shape in shapes)
    for check in verify_deployment(tmp_path / "out", graphs.model, TOKENS[0].numpy(), lengths=(1, 65, 150)):
        assert check.logits < 1e-3
        assert check.kl < 1e-7
        assert check.top1_agreement == 1.0


def test_what_is_chosen_by_keeps_its_weights(graphs, tmp_path):
    graphs.deploy(tmp_path / "out", weights="w8", data=TOKENS)
    kept = [weight for module in indexers(graphs.model) for weight in module.parameters() if weight.ndim == 2]
    kept += [weight for name, weight in graphs.model.named_parameters() if name.endswith("_hc.fn")]
    constants = [
        numpy_helper.to_array(x) for x in onnx.load(tmp_path / "out" / "prefill.onnx").graph.initializer
    ]
    for weight in kept:
        matrix = weight.detach().numpy()
        assert any(np.array_equal(x, matrix) or np.array_equal(x, matrix.T) for x in constants)
    checks = verify_deployment(tmp_path / "out", graphs.model, TOKENS[0].numpy(), lengths=(150,))
    assert max(check.logits for check in checks) < 1e-3
