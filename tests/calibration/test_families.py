"""Every family of models with the inverse, as a tiny model with random weights."""

import inspect

import pytest
import torch
from tiny_models import CONFIGS, VOCABULARY, build

import qinvert
from qinvert.calibration.patching import ATTRIBUTE_NAME, FAMILIES, GLOBAL_NAMES, delta_layers, run_model
from qinvert.errors import InputError
from qinvert.matrices import check_beta, check_matrices
from qinvert.pretrained import load_pretrained

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

CHUNK = 64
#: One sequence of two whole chunks, one that ends in a third.
TOKENS = torch.randint(0, VOCABULARY, (2, 130), generator=torch.Generator().manual_seed(0))
PROMPT = TOKENS[:1, :100]

#: One decay a channel: the original multiplies by a T that it forms row by row.
CHANNEL_FAMILIES = ("kimi_linear", "bailing_hybrid", "glm5_next")
#: The families that the installed transformers has; the pinned one has all.
INSTALLED = [name for name, (kind, _) in CONFIGS.items() if kind in transformers.CONFIG_MAPPING]


@pytest.fixture(scope="module", params=INSTALLED)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return build(family)


@pytest.fixture(scope="module")
def plan(model):
    return qinvert.calibrate(model, TOKENS, method="block_merge", bits=8)


def logits(model, tokens=TOKENS):
    return run_model(model, {"input_ids": tokens})


def no_inverse(lower):
    return torch.eye(lower.shape[-1]).expand(lower.shape)


def solves(model):
    """Whether the family's own function solves a triangular system, as transformers 5.17 and later do."""
    module = inspect.getmodule(type(next(iter(delta_layers(model).values()))))
    functions = [getattr(module, name) for name in GLOBAL_NAMES if hasattr(module, name)]
    return any("solve_triangular" in inspect.getsource(inspect.unwrap(f)) for f in functions)


def test_every_family_is_tested():
    assert tuple(CONFIGS) == FAMILIES
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 20):
        assert list(FAMILIES) == INSTALLED


def test_the_exact_inverse_reproduces_the_model(family, model):
    before = logits(model)
    with qinvert.patched(model, qinvert.exact_inverse):
        inside = logits(model)
    if solves(model):
        assert family not in CHANNEL_FAMILIES
        assert torch.equal(inside, before)
    else:
        assert torch.allclose(inside, before, rtol=0, atol=2e-6)
    assert torch.equal(logits(model), before)


def test_an_inverse_that_is_formed_reproduces_the_model(model):
    with qinvert.patched(model, lambda lower: qinvert.exact_inverse(lower)):
        inside = logits(model)
    assert torch.allclose(inside, logits(model), rtol=0, atol=2e-6)


def test_the_inverse_matters_and_is_restored(model):
    before = logits(model)
    with qinvert.patched(model, no_inverse):
        assert (logits(model) - before).abs().max() > 1e-2
    assert torch.equal(logits(model), before)


def test_capture_sees_every_matrix_of_every_layer_under_its_name(family, model):
    attention = "self_attn" if family in CHANNEL_FAMILIES else "linear_attn"
    prefix = "model.language_model" if family == "glm5_next" else "model"
    heads = 2 if family in CHANNEL_FAMILIES or family == "olmo_hybrid" else 4
    found = list(qinvert.capture_details(model, [TOKENS, PROMPT], details=("beta",)))
    assert [item.layer for item in found] == [f"{prefix}.layers.{i}.{attention}" for i in (0, 2)] * 2
    shapes = [tuple(item.lower.shape) for item in found]
    assert shapes == [(2, heads, 3, CHUNK, CHUNK)] * 2 + [(1, heads, 2, CHUNK, CHUNK)] * 2
    largest = 0.0
    for item in found:
        lower = check_matrices(item.lower, CHUNK)
        check_beta(item.beta, lower)
        largest = max(largest, float(item.beta.max()))
    # Only this family lets beta exceed 1, for negative eigenvalues.
    assert (largest > 1) == (family == "olmo_hybrid")


def test_an_int8_plan_runs_the_model(model, plan):
    assert list(plan.layers) == list(delta_layers(model))
    before = logits(model)
    with qinvert.patched(model, plan):
        inside = logits(model)
    error = (inside - before).abs().max()
    with qinvert.patched(model, no_inverse):
        unsolved = (logits(model) - before).abs().max()
    assert 0 < error < 0.2 * unsolved


def test_a_saved_model_loads_and_captures_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    for (name, lower), (other, same) in zip(
        qinvert.capture(model, PROMPT), qinvert.capture(loaded, PROMPT), strict=True
    ):
        # Models of text only drop the prefix that holds the parts of others apart.
        assert name.endswith(other)
        assert torch.equal(lower, same)


def test_generation_with_a_cache_gives_the_same_tokens(model):
    arguments = {"max_new_tokens": 4, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    expected = model.generate(PROMPT, **arguments)
    calls = []

    def inverse(lower):
        calls.append(lower.shape)
        return qinvert.exact_inverse(lower)

    with qinvert.patched(model, inverse):
        result = model.generate(PROMPT, **arguments)
    assert torch.equal(result, expected)
    # One prefill; the steps that follow are recurrent.
    assert len(calls) == len(delta_layers(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_run(family, plan, dtype):
    model = build(family, dtype)
    before = logits(model)
    with qinvert.patched(model, qinvert.exact_inverse):
        inside = logits(model)
    assert inside.dtype == dtype
    if solves(model):
        assert torch.equal(inside, before)
    else:
        # Not the largest: a rounding can send a token to another expert.
        error = (inside - before).float().abs().amax(-1).quantile(0.9)
        assert error <= 4 * torch.finfo(dtype).eps * before.abs().max()
    # A model drawn in this type has weights of its own.
    with qinvert.patched(model, plan, force=True):
        assert torch.isfinite(logits(model)).all()


def test_everything_is_restored_after_an_exception(model):
    layer = next(iter(delta_layers(model).values()))
    module = inspect.getmodule(type(layer))
    names = [name for name in GLOBAL_NAMES if hasattr(module, name)]
    originals = [getattr(module, name) for name in names]
    attribute = getattr(layer, ATTRIBUTE_NAME, None)

    def fail(lower):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), qinvert.patched(model, fail):
        logits(model)
    assert [getattr(module, name) for name in names] == originals
    assert getattr(layer, ATTRIBUTE_NAME, None) is attribute
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_a_model_of_another_kind_is_refused_with_all_families():
    with pytest.raises(InputError, match=", ".join(FAMILIES)):
        delta_layers(torch.nn.Linear(2, 2))
