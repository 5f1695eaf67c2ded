import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_models import build, of_layers

import qinvert
from qinvert import recall
from qinvert.calibration.patching import delta_layers, run_model
from qinvert.errors import InputError, PlanError

pytest.importorskip("transformers")

TOKENS = recall.sequences(2, seed=3)
LAYERS = ["model.layers.0.linear_attn", "model.layers.1.linear_attn"]


def no_inverse(lower):
    return torch.eye(lower.shape[-1]).expand(lower.shape)


@pytest.fixture(scope="module")
def model():
    return recall.load_model()


@pytest.fixture(scope="module")
def plan(model):
    return qinvert.calibrate(model, recall.sequences(4))


@pytest.fixture(scope="module")
def small_qwen3_next():
    return build("qwen3_next", **of_layers("linear_attention", "full_attention"))


def logits(model, tokens=TOKENS):
    return run_model(model, {"input_ids": tokens})


def test_the_exact_inverse_reproduces_the_model(model):
    before = logits(model)
    with qinvert.patched(model, qinvert.exact_inverse):
        inside = logits(model)
    assert torch.allclose(inside, before, atol=2e-5 * float(before.abs().max()))
    assert torch.equal(logits(model), before)


def test_grouped_heads_and_attention_layers_reproduce_the_model(small_qwen3_next):
    tokens = torch.arange(130).remainder(64).unsqueeze(0)
    before = logits(small_qwen3_next, tokens)
    assert list(delta_layers(small_qwen3_next)) == ["model.layers.0.linear_attn"]
    with qinvert.patched(small_qwen3_next, qinvert.exact_inverse):
        assert torch.allclose(logits(small_qwen3_next, tokens), before, atol=2e-6)


def test_another_inverse_changes_the_model_and_is_undone(model):
    before = logits(model)
    with qinvert.patched(model, no_inverse) as same:
        assert same is model
        assert not torch.allclose(logits(model), before, atol=0.1)
    assert torch.equal(logits(model), before)


def test_a_plan_runs_each_layer_with_its_own_program(model, plan, monkeypatch):
    with qinvert.patched(model, plan):
        assert recall.accuracy(logits(model), TOKENS) == 1.0
    seen = []
    original = qinvert.LayerPlan.inverse

    def recorded(self, lower):
        seen.append(self)
        return original(self, lower)

    monkeypatch.setattr(qinvert.LayerPlan, "inverse", recorded)
    with qinvert.patched(model, plan):
        logits(model)
    assert [id(layer) for layer in seen] == [id(plan.layers[name]) for name in LAYERS]


def test_everything_is_restored_after_an_exception(model):
    before = logits(model)

    def fail(lower):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), qinvert.patched(model, fail):
        logits(model)
    assert torch.equal(logits(model), before)
    with qinvert.patched(model, qinvert.exact_inverse):
        logits(model)


def test_nested_use_is_refused_and_leaves_the_outer_patch(model):
    before = logits(model)
    with qinvert.patched(model, no_inverse):
        inside = logits(model)
        with pytest.raises(InputError, match="patched already"), qinvert.patched(model, no_inverse):
            pass
        assert torch.equal(logits(model), inside)
    assert torch.equal(logits(model), before)


def test_other_models_of_the_family_keep_their_own_inverse(model):
    other = recall.load_model()
    before = logits(other)
    with qinvert.patched(model, no_inverse):
        assert torch.equal(logits(other), before)
        with qinvert.patched(other, qinvert.exact_inverse):
            assert torch.allclose(logits(other), before, atol=1e-3)
            assert not torch.allclose(logits(model), before, atol=0.1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_patched_model_is_not_patched(copied):
    # Of a model of one's own: pickles and copies hold all of it.
    model = build("qwen3_next", **of_layers("linear_attention", "full_attention"))
    tokens = TOKENS % 64
    before = logits(model, tokens)
    with qinvert.patched(model, no_inverse):
        assert not torch.equal(logits(model, tokens), before)
        copy_ = copied(model)
        # The function that is replaced is shared, the layer that runs is not.
        assert torch.equal(logits(copy_, tokens), before)
    assert torch.equal(logits(copy_, tokens), before)
    assert torch.equal(logits(model, tokens), before)
    with qinvert.patched(copy_, no_inverse):
        assert not torch.equal(logits(copy_, tokens), before)
        assert torch.equal(logits(model, tokens), before)


def test_a_model_may_be_given_by_its_folder(model, plan):
    folder = Path(qinvert.__file__).parent / "assets" / "recall"
    for given in (folder, str(folder)):
        assert [name for name, _ in qinvert.capture(given, TOKENS)] == LAYERS
    assert qinvert.calibrate(folder, recall.sequences(4)).to_bytes() == plan.to_bytes()
    assert list(qinvert.simulate(plan, folder, TOKENS).layers) == LAYERS
    assert qinvert.evaluate(folder, plan, TOKENS).kl == qinvert.evaluate(model, plan, TOKENS).kl
    with pytest.raises(InputError, match="is not a model folder"):
        qinvert.calibrate(folder.parent, TOKENS)


def test_generation_with_a_cache_gives_the_same_tokens(small_qwen3_next):
    prompt = torch.arange(100).remainder(64).unsqueeze(0)
    arguments = {"max_new_tokens": 5, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    expected = small_qwen3_next.generate(prompt, **arguments)
    with qinvert.patched(small_qwen3_next, qinvert.exact_inverse):
        assert torch.equal(small_qwen3_next.generate(prompt, **arguments), expected)


def test_half_precision_models_run(plan):
    model = recall.load_model().to(torch.bfloat16)
    with qinvert.patched(model, plan):
        result = logits(model)
    assert result.dtype == torch.bfloat16
    assert recall.accuracy(result, TOKENS) > 0.95


def test_capture_streams_every_layer_of_every_batch(model):
    found = list(qinvert.capture(model, [TOKENS, TOKENS[:1, :100]]))
    assert [name for name, _ in found] == LAYERS * 2
    # [batch, heads, chunks, C, C]
    assert [tuple(lower.shape) for _, lower in found[::2]] == [(2, 2, 8, 64, 64), (1, 2, 2, 64, 64)]
    padded = found[2][1][:, :, 1, 36:]
    assert not bool(padded.any())
    for _, lower in found:
        assert not bool(torch.triu(lower).any())
        assert float(lower.abs().max()) <= 1 + 1e-5


def test_captured_matrices_invert_to_bounded_ones(model):
    for _, lower in qinvert.capture(model, TOKENS):
        assert float(torch.tril(qinvert.exact_inverse(lower), -1).abs().max()) <= 1 + 1e-6


@pytest.mark.parametrize(
    "use", [qinvert.calibrate, lambda m, **_: qinvert.patched(m, no_inverse).__enter__()]
)
def test_a_model_without_delta_layers_is_refused_with_the_families(use):
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="qwen3_next, qwen3_5"):
        use(linear, data=TOKENS)


def test_a_plan_of_another_model_is_refused(model, plan):
    other = qinvert.Plan(layers={"elsewhere": plan.layer(LAYERS[0])}, target=plan.target)
    with (
        pytest.raises(PlanError, match="lacks layer"),
        qinvert.patched(model, other),
    ):
        pass


def test_a_model_needs_data(model):
    with pytest.raises(InputError, match="data="):
        qinvert.calibrate(model)


def test_tokens_outside_the_vocabulary_are_refused(model):
    with pytest.raises(InputError, match="vocabulary"):
        qinvert.calibrate(model, torch.full((1, 8), 10_000))


def test_what_is_no_inverse_is_refused(model):
    with pytest.raises(InputError, match="cannot use int"), qinvert.patched(model, 3):
        pass


def test_patches_of_two_models_may_end_in_any_order(model):
    other = recall.load_model()
    before = logits(model)
    module = sys.modules[type(next(iter(delta_layers(model).values()))).__module__]
    original = module.torch_chunk_gated_delta_rule
    first, second = qinvert.patched(model, no_inverse), qinvert.patched(other, no_inverse)
    first.__enter__()
    changed = logits(model)
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(other), changed)
    second.__exit__(None, None, None)
    assert torch.equal(logits(other), before)
    assert module.torch_chunk_gated_delta_rule is original


def test_models_patched_in_two_threads_keep_their_own_inverse(model):
    other = recall.load_model()
    before = logits(other)
    with (
        qinvert.patched(model, no_inverse),
        qinvert.patched(other, qinvert.exact_inverse),
        ThreadPoolExecutor(2) as pool,
    ):
        alone = logits(model)
        for changed, exact in zip(pool.map(logits, [model] * 4), pool.map(logits, [other] * 4), strict=True):
            assert torch.equal(changed, alone)
            assert torch.allclose(exact, before, atol=1e-3)


def test_layers_whose_forward_is_wrapped_are_found_and_patched(small_qwen3_next):
    """As accelerate does for device_map: an instance attribute that moves inputs, then calls the old one."""
    tokens = torch.arange(70).remainder(64).unsqueeze(0)
    before = logits(small_qwen3_next, tokens)
    layer = delta_layers(small_qwen3_next)["model.layers.0.linear_attn"]
    old = layer.forward
    layer.forward = lambda *args, **kwargs: old(*args, **kwargs)
    try:
        with qinvert.patched(small_qwen3_next, no_inverse):
            assert not torch.equal(logits(small_qwen3_next, tokens), before)
        with qinvert.patched(small_qwen3_next, qinvert.exact_inverse):
            assert torch.equal(logits(small_qwen3_next, tokens), before)
    finally:
        del layer.forward


def test_autocast_around_the_model_leaves_the_integers_alone(model, plan):
    captured = dict(qinvert.capture(model, TOKENS))
    for name, lower in captured.items():
        expected = plan.layers[name].inverse(lower)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(plan.layers[name].inverse(lower), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16), qinvert.patched(model, plan):
        assert recall.accuracy(logits(model), TOKENS) > 0.95


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": TOKENS.to(torch.float32)},
        {"input_ids": "text"},
        {"input_ids": TOKENS, "attention_mask": "text"},
        {"tokens": TOKENS},
        {},
    ],
    ids=lambda batch: ",".join(batch) or "nothing",
)
def test_batches_that_do_not_fit_the_model_are_input_errors(model, batch):
    with pytest.raises(InputError, match=r"batch|token ids|no array of numbers"):
        qinvert.calibrate(model, [batch])
    assert torch.isfinite(logits(model)).all()
