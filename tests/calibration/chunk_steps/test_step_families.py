"""Whole steps in all families of models: tiny ones with random weights."""

import pytest
import torch
from tiny_models import CONFIGS, VOCABULARY, build, of_layers

import qinvert
from qinvert import ChunkOptions
from qinvert.calibration.patching import delta_layers, run_model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

#: Two whole chunks, and one that ends after two tokens.
TOKENS, OTHER = (
    torch.randint(0, VOCABULARY, (1, 130), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
)
INSTALLED = [name for name, (kind, _) in CONFIGS.items() if kind in transformers.CONFIG_MAPPING]
#: Largest KL on other data, in nats, with 8 bits and with values and state of 16 bits.
KL = {
    "qwen3_next": (2e-4, 5e-5),
    "qwen3_5": (1e-4, 2e-5),
    "qwen3_5_moe": (2e-4, 2e-5),
    "qwen4_exp": (5e-6, 3e-6),
    "olmo_hybrid": (5e-4, 2e-4),
    "kimi_linear": (5e-3, 5e-4),
    "bailing_hybrid": (1e-3, 2e-4),
    "glm5_next": (1e-2, 1e-3),
}
OPTIONS = (
    {"bits": 8},
    {"target": "npu-qdq-int16", "chunk": ChunkOptions(value_bits=16, state_bits=16)},
)


def tiny(family):
    """A model with one or two layers of linear attention."""
    changes = {} if family == "glm5_next" else of_layers("linear_attention", "full_attention")
    return build(family, **changes)


@pytest.fixture(scope="module", params=INSTALLED)
def planned(request):
    model = tiny(request.param)
    plans = [qinvert.calibrate(model, TOKENS, scope="chunk", **options) for options in OPTIONS]
    return request.param, model, plans


def test_every_family_runs_whole_steps_in_integers(planned):
    family, model, plans = planned
    for plan, bound in zip(plans, KL[family], strict=True):
        assert list(plan.layers) == list(delta_layers(model))
        found = qinvert.evaluate(model, plan, OTHER)
        assert 0 < found.kl < bound
        for errors in found.layers.values():
            assert errors.t is errors.u is errors.w is None
            assert errors.out > 5
            assert errors.state > 5
    assert {q.format.name for q in next(iter(plans[0].layers.values())).tensors.values()} == {"int8"}


def test_logits_are_finite_and_close(planned):
    _, model, plans = planned
    exact = run_model(model, {"input_ids": OTHER})
    # Sums of log decays of each channel are coarse in 8 bits.
    for plan, share in zip(plans, (0.4, 0.15), strict=True):
        with qinvert.patched(model, plan):
            inside = run_model(model, {"input_ids": OTHER})
        assert bool(torch.isfinite(inside).all())
        assert 0 < float((inside - exact).norm()) < share * float(exact.norm())
    assert torch.equal(run_model(model, {"input_ids": OTHER}), exact)


def test_generation_goes_on_from_the_state_of_the_integers(planned):
    _, model, (_, plan) = planned
    arguments = {"max_new_tokens": 3, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    with qinvert.patched(model, plan):
        result = model.generate(TOKENS[:1, :100], **arguments)
    assert result.shape == (1, 103)
    assert torch.equal(result[:, :100], TOKENS[:1, :100])


def cached(model, tokens, start):
    """Logits of the tokens from ``start`` on: a prefill, then one token after the other."""
    inside = model(input_ids=tokens[:, :start], use_cache=True)
    cache, found = inside.past_key_values, []
    for i in range(start, tokens.shape[1]):
        step = model(input_ids=tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        found.append(step.logits)
    return torch.cat(found, 1)


def test_prefill_then_decode_is_prefill_of_the_whole_within_the_error_of_the_plan(planned):
    _, model, (_, plan) = planned
    tokens = TOKENS[:, :68]
    with torch.no_grad():
        exact = model(input_ids=tokens).logits[:, 64:]
        reference = cached(model, tokens, 64)
        with qinvert.patched(model, plan):
            whole = model(input_ids=tokens).logits[:, 64:]
            decoded = cached(model, tokens, 64)
    assert torch.allclose(reference, exact, atol=1e-4)
    # Decoding is floating point, from the state that the integers left.
    size = float(exact.abs().max())
    error = max(float((whole - exact).abs().max()), 1e-3 * size)
    assert float((decoded - exact).abs().max()) <= 3 * error
    assert float((decoded - whole).abs().max()) <= 4 * error
