"""Windows of a model with all states as tensors, before they become a graph: integers of the plans."""

import pytest
import torch
from tiny_models import CONFIGS, VOCABULARY, build, of_both
from windows import WIDE, driven, whole

import qinvert
from qinvert import ChunkOptions, PlanError, recall
from qinvert.export.deployment.attention import attention, window_mask
from qinvert.export.deployment.cache import convolution_tail
from qinvert.export.deployment.states import StateKind
from qinvert.export.deployment.step_calls import layer_steps

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def remembering():
    model = recall.load_model()
    return model, qinvert.calibrate(model, recall.sequences(2), scope="chunk", **WIDE)


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_windows_are_the_patched_model(remembering, chunks, length):
    tokens = recall.sequences(1, seed=5)[:, :length]
    found, exact = driven(*remembering, tokens, chunks)[0], whole(*remembering, tokens)
    # Products of other shapes may add up in another order, and so round an input to the next integer.
    assert float((found - exact).norm()) < 5e-3 * float(exact.norm())


def test_decoding_recalls(remembering):
    tokens = recall.sequences(1, seed=6)[:, :200]
    found, _ = driven(*remembering, tokens, 1, decoded=72)
    assert recall.accuracy(found, tokens) == 1.0


def tiny(family):
    model = build(family, **of_both(family))
    tokens = torch.randint(0, VOCABULARY, (1, 150), generator=torch.Generator().manual_seed(0))
    return model, qinvert.calibrate(model, tokens, scope="chunk", **WIDE), tokens


@pytest.mark.parametrize("family", CONFIGS)
def test_families_with_attention_go_on_from_their_caches(family):
    model, plan, tokens = tiny(family)
    exact = whole(model, plan, tokens)
    found, states = driven(model, plan, tokens, 1)
    assert float((found - exact).abs().max()) < 1e-5
    assert int(states["position"]) == 150
    assert states["visible"].sum() == 150
    decoded, _ = driven(model, plan, tokens, 1, decoded=4)
    # A state is rounded once a token here, and once a chunk there.
    assert float((decoded - exact)[:, -4:].norm()) < 0.05 * float(exact[:, -4:].norm())


def test_a_state_in_float32_goes_from_window_to_window():
    model = recall.load_model()
    options = ChunkOptions(value_bits=16, state_bits="float32")
    plan = qinvert.calibrate(model, recall.sequences(2), scope="chunk", target="npu-qdq-int16", chunk=options)
    tokens = recall.sequences(1, seed=5)[:, :130]
    found, states = driven(model, plan, tokens, 1)
    exact = whole(model, plan, tokens)
    assert float((found - exact).abs().max()) < 1e-4 * float(exact.abs().max())
    # It lies on no grid.
    state = next(x for name, x in states.items() if name.startswith("recurrent"))
    steps = state / next(iter(plan.layers.values())).tensors["v_new"].scale
    assert float((steps - steps.round()).abs().max()) > 0.1


def test_the_model_is_what_it_was(remembering):
    model, plan = remembering
    tokens = recall.sequences(1, seed=5)[:, :70]
    before = {name: vars(module).get("forward") for name, module in model.named_modules()}
    implementation = model.config._attn_implementation
    with torch.no_grad():
        exact = model(tokens).logits
        driven(model, plan, tokens, 1)
        assert torch.equal(model(tokens).logits, exact)
    assert model.config._attn_implementation == implementation
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == before


def test_plans_that_do_not_fit_are_refused():
    model = recall.load_model()
    tokens = recall.sequences(1)[:, :128]
    with pytest.raises(PlanError, match="scope='chunk'"):
        layer_steps(qinvert.calibrate(model, tokens, bits=8), 1, None)
    heads = qinvert.calibrate(model, tokens, scope="chunk", bits=8, granularity="head")
    with pytest.raises(PlanError, match="granularity='tensor'"):
        layer_steps(heads, 1, None)


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_the_tail_of_a_convolution_is_a_slice(count):
    x = torch.randn(1, 4, 8 + 3)
    valid = (torch.arange(8) < count).float()[None]
    assert torch.equal(x @ convolution_tail(valid, 3), x[:, :, count : count + 3])


def test_attention_is_that_of_torch():
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, 5, 8, generator=draw)
    k, v = (torch.randn(1, 2, 12, 8, generator=draw) for _ in "kv")
    visible, valid = torch.ones(1, 1, 1, 7), torch.ones(1, 1, 1, 5)
    visible[..., :3], valid[..., 4:] = 0, 0
    mask = window_mask(visible, valid, torch.ones(1, 1, 5, 5).tril())
    out, _ = attention(None, q, k, v, mask)
    seen = torch.cat([visible.expand(1, 1, 5, 7), valid * torch.ones(5, 5).tril()], 3).bool()
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
    assert torch.allclose(out, wanted.transpose(1, 2), atol=1e-6)
    other, _ = attention(None, q, k, v, mask * 0)
    assert not torch.allclose(other, wanted.transpose(1, 2), atol=1e-2)


def test_states_have_names_for_hosts():
    assert [kind.value for kind in StateKind] == [
        "recurrent",
        "convolution",
        "keys",
        "values",
        "visible",
        "position",
        "blocks",
        "tail",
        "entries",
    ]
